//! An examination of the folder of runs: what is there that belongs to no build in hand.

use std::io;
use std::path::Path;
use std::time::{Duration, SystemTime};

use kiln_domain::finding::{Finding, spoken};
use kiln_domain::id::RunId;
use rustix::fs::statvfs;

use crate::REVOKED_FOR;
use crate::folder::{Folder, Holder};

/// A marker goes at the next removal of a run; so much later it is worth a word.
const MARKER_LATE: Duration = Duration::from_secs(60 * 60);
/// Bytes of a disk with which builds fail soon.
const NO_ROOM: u64 = 1 << 30;
const LITTLE_ROOM: u64 = 5 << 30;

const RUNS: &str = "runs";

/// How the build of a run stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stands {
    /// It waits or runs, or has been over for so short a time that its clean-up may be under way.
    InHand,
    Over,
    /// Over, and no longer among those that are to be cleaned up.
    Cleaned,
    /// Nobody knows of it.
    Unknown,
    /// Nobody could be asked.
    NotAsked,
}

/// A run's folder as it was found.
#[derive(Clone, Debug)]
pub struct Found {
    pub run: RunId,
    /// Since something of it was last written.
    pub age: Duration,
    /// Something of it lives.
    pub lives: bool,
    /// What lives, as far as this user may see: pid and program.
    processes: Vec<(i32, String)>,
    /// Only its revocation is left, since then.
    revoked: Option<Duration>,
}

/// Looks at every run in the folder of runs.
pub fn look(runs: &Path) -> io::Result<Vec<Found>> {
    let now = now();
    let since = |at: SystemTime| now.duration_since(at).unwrap_or_default();
    let mut found = Vec::new();
    for entry in std::fs::read_dir(runs)?.flatten() {
        let Some(run) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let folder = Folder::new(entry.path());
        let look = || {
            let lives = folder.holder()? != Holder::Nobody;
            let processes = if lives { folder.processes()? } else { Vec::new() };
            let processes =
                processes.into_iter().map(|(pid, name)| (pid.as_raw_nonzero().get(), name)).collect();
            let revoked = folder.only_revoked()?.map(since);
            io::Result::Ok(Found { run, age: since(folder.changed()?), lives, processes, revoked })
        };
        match look() {
            Ok(run) => found.push(run),
            // Removed while it was looked at.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}

impl Found {
    /// Whether all of it but a revocation may go: nothing in it is of use to a build.
    pub fn is_leftover(&self, stands: Stands) -> bool {
        self.revoked.is_none() && matches!(stands, Stands::Over | Stands::Cleaned | Stands::Unknown)
    }

    /// Whether it is no more than a revocation.
    pub fn is_marker(&self) -> bool {
        self.revoked.is_some()
    }
}

/// What is to be said of runs, by how their builds stand.
pub fn findings(found: &[Found], stands: impl Fn(&Found) -> Stands) -> Vec<Finding> {
    let mut findings = Vec::new();
    for found in found {
        let (run, stands) = (&found.run, stands(found));
        if !found.is_leftover(stands) {
            continue;
        }
        let build = match stands {
            Stands::Unknown => "of which no build is known",
            _ => "whose build is over",
        };
        if found.lives {
            let seen: Vec<String> =
                found.processes.iter().map(|(pid, name)| format!("{pid} {name}")).collect();
            let seen =
                if seen.is_empty() { "none that this user may see".to_owned() } else { seen.join(", ") };
            findings.push(Finding::problem(
                "processes",
                format!("run `{run}`, {build}, still has processes: {seen}"),
                "`kiln doctor --fix` ends those of builds that are over; others are ended by `kill -9`",
            ));
        } else {
            findings.push(Finding::warning(
                RUNS,
                format!("the folder of run `{run}`, {build}, is left; last written {} ago", spoken(found.age)),
                match stands {
                    Stands::Over => {
                        "an orchestrator removes it by itself within minutes, once the build's log is complete; `kiln doctor --fix` does it now"
                    }
                    _ => {
                        "`kiln doctor --fix` removes it; no orchestrator does by itself, as nothing says any more that this build is to be cleaned up"
                    }
                },
            ));
        }
    }
    let late = |found: &&Found| found.revoked.is_some_and(|age| age > REVOKED_FOR + MARKER_LATE);
    let late = found.iter().filter(late).count();
    if late > 0 {
        findings.push(Finding::warning(
            RUNS,
            format!("{late} revocations are older than a day"),
            "they go by themselves when a role with the engine starts, or the next run is removed; `kiln doctor --fix` does it now",
        ));
    }
    if findings.is_empty() {
        let (kept, live) = (
            found.iter().filter(|found| !found.is_marker()).count(),
            found.iter().filter(|found| found.lives).count(),
        );
        let says = format!("{kept} there, {live} of them live");
        let unasked = found.iter().any(|found| !found.is_marker() && stands(found) == Stands::NotAsked);
        findings.push(if unasked {
            Finding::unchecked(
                RUNS,
                format!("{says}; which of them belong to a build can't be told without the bus"),
                "ask again when NATS can be reached",
            )
        } else {
            Finding::ok(RUNS, says)
        });
    }
    findings
}

/// How much room is left on the disk of a folder.
pub fn room(part: &str, folder: &Path) -> Finding {
    let disk = match statvfs(folder) {
        Ok(disk) => disk,
        Err(error) => {
            return Finding::unchecked(
                part,
                format!("{}: {error}", folder.display()),
                "run this as the user of the engine, on its host",
            );
        }
    };
    let (free, all) =
        (disk.f_bavail.saturating_mul(disk.f_frsize), disk.f_blocks.saturating_mul(disk.f_frsize));
    let says =
        format!("{} GiB of {} GiB are free on the disk of {}", free >> 30, all >> 30, folder.display());
    let remedy = "make room: the layers that builds keep are under `layers` of the engine's folder";
    if free < NO_ROOM || (disk.f_files > 0 && disk.f_favail < 10_000) {
        Finding::problem(part, format!("{says}, and {} files", disk.f_favail), remedy)
    } else if free < LITTLE_ROOM {
        Finding::warning(part, says, remedy)
    } else {
        Finding::ok(part, says)
    }
}

#[expect(clippy::disallowed_methods, reason = "the age of a file is told by the wall clock")]
pub(crate) fn now() -> SystemTime {
    SystemTime::now()
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_domain::id::{BuildId, ImageKey};

    #[test]
    fn who_removes_a_folder_is_told_as_it_is() {
        let found = Found {
            run: RunId::new(&BuildId::new(&ImageKey::of("x"), [0; 10]), 1),
            age: Duration::from_secs(3600),
            lives: false,
            processes: Vec::new(),
            revoked: None,
        };
        for (stands, who) in [
            (Stands::Over, "an orchestrator removes it by itself"),
            (Stands::Cleaned, "no orchestrator does by itself"),
            (Stands::Unknown, "no orchestrator does by itself"),
        ] {
            let remedy = findings(std::slice::from_ref(&found), |_| stands).swap_remove(0).remedy.unwrap();
            assert!(remedy.contains(who) && remedy.contains("`kiln doctor --fix`"), "{stands:?}: {remedy}");
        }
        assert_eq!(findings(&[found], |_| Stands::InHand).swap_remove(0).remedy, None);
    }
}
