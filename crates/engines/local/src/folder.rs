//! A run's folder as the engine sees it. Everything here is a few system calls on a local disk, and blocks for them.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, SystemTime};

use kiln_domain::id::RunId;
use kiln_domain::run::{Ended, RunSecrets, RunSpec};
use kiln_domain::run_folder::{self, SecretsFile, Settings};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use rustix::process::Pid;
use serde::Serialize;

use crate::kill;

/// How long a revocation waits for a PUT that has begun.
const PUSH: Duration = Duration::from_secs(10);
const AGAIN: Duration = Duration::from_millis(2);

/// A run's folder, there or not.
#[derive(Clone, Debug)]
pub(crate) struct Folder {
    path: PathBuf,
}

/// Who has a run's lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Holder {
    Nobody,
    /// A builder, or an engine that is about to start or clear one.
    Builder,
    /// What a builder started, and the builder itself doesn't live; or it is just beginning.
    Others,
}

/// Whether a builder is to be started.
pub(crate) enum Begun {
    /// Yes, with these: the locked lock, and its output.
    Start {
        lock: File,
        output: File,
    },
    /// It was started before.
    Before,
    Revoked,
}

/// A piece of the output.
pub(crate) struct Piece {
    pub(crate) bytes: Vec<u8>,
    pub(crate) end: bool,
}

impl Folder {
    pub(crate) fn new(path: PathBuf) -> Self {
        Self { path }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    pub(crate) fn has(&self, name: &str) -> io::Result<bool> {
        self.file(name).try_exists()
    }

    pub(crate) fn exists(&self) -> io::Result<bool> {
        self.path.try_exists()
    }

    /// Prepares a start. Who has the lock decides; that a builder was started once is told by its output.
    pub(crate) fn begin(
        &self,
        spec: &RunSpec,
        secrets: &RunSecrets,
        settings: &Settings,
    ) -> io::Result<Begun> {
        self.make()?;
        if self.has(run_folder::REVOKED)? {
            return Ok(Begun::Revoked);
        }
        let Some(lock) = self.take_lock()? else { return Ok(Begun::Before) };
        // Looked for again under the lock. Should it come right after this, the builder finds it under the same lock.
        if self.has(run_folder::REVOKED)? {
            return Ok(Begun::Revoked);
        }
        if self.has(run_folder::OUTPUT)? {
            return Ok(Begun::Before);
        }
        self.write(run_folder::SECRETS, &SecretsFile::from(secrets))?;
        self.write(run_folder::SETTINGS, settings)?;
        self.write(run_folder::SPEC, spec)?;
        let output = private().append(true).create_new(true).open(self.file(run_folder::OUTPUT))?;
        Ok(Begun::Start { lock, output })
    }

    /// The start came to nothing: another may be made.
    pub(crate) fn not_begun(&self) -> io::Result<()> {
        gone(fs::remove_file(self.file(run_folder::OUTPUT)))
    }

    /// Who holds the run at the moment.
    pub(crate) fn holder(&self) -> io::Result<Holder> {
        if self.is_free(run_folder::LOCK)? {
            Ok(Holder::Nobody)
        } else if self.is_free(run_folder::BUILDER_LOCK)? {
            Ok(Holder::Others)
        } else {
            Ok(Holder::Builder)
        }
    }

    /// What an ended run left: whoever calls this has seen the lock free.
    pub(crate) fn ended(&self) -> io::Result<Ended> {
        let outcome = match gone(fs::read(self.file(run_folder::OUTCOME)).map(Some))? {
            Some(text) => serde_json::from_slice(&text)
                .inspect_err(|error| {
                    tracing::error!("outcome in {} cannot be read: {error}", self.path.display())
                })
                .ok(),
            None => None,
        };
        let recorded = gone(fs::read_to_string(self.file(run_folder::TARGET_DIGEST)).map(Some))?;
        Ok(Ended { outcome, recorded: recorded.and_then(|digest| digest.trim().parse().ok()) })
    }

    /// Asks the builder to end.
    pub(crate) fn ask_to_end(&self) -> io::Result<()> {
        private().write(true).create(true).truncate(false).open(self.file(run_folder::CANCEL)).map(drop)
    }

    /// Nobody is to be asked, or made, to end any more: what lives from now on only clears up. Called under the lock.
    pub(crate) fn withdraw(&self) -> io::Result<()> {
        gone(fs::remove_file(self.file(run_folder::CANCEL)))
    }

    /// Whether something lives that was asked to end.
    pub(crate) fn is_ending(&self) -> io::Result<bool> {
        Ok(self.has(run_folder::CANCEL)? && self.holder()? != Holder::Nobody)
    }

    /// Whether a builder is in the middle of its PUT.
    pub(crate) fn is_putting(&self) -> io::Result<bool> {
        Ok(!self.is_free(run_folder::PUSH_LOCK)?)
    }

    /// Kills what lives of the run.
    pub(crate) fn kill(&self) -> io::Result<()> {
        gone(kill::holders(&self.file(run_folder::LOCK)))
    }

    /// Revokes the run, durably. False where a builder is in the middle of its PUT: the revocation stands, but it can't be
    /// told yet whether that PUT counts.
    ///
    /// After true no builder of the run PUTs the target: a builder looks for the revocation once it has the push lock,
    /// and keeps that lock until its PUT is over, whatever it is told meanwhile. Either it looked before the revocation was written: then it had the
    /// lock, and as it was had here after, its PUT is over. Or it looks later, and finds the revocation.
    pub(crate) fn revoke(&self) -> io::Result<bool> {
        self.make()?;
        let mut file =
            private().write(true).create(true).truncate(true).open(self.file(run_folder::REVOKED))?;
        // Written each time, so that its age counts from the last time.
        file.write_all(b"revoked\n")?;
        file.sync_all()?;
        File::open(&self.path)?.sync_all()?;
        if let Some(parent) = self.path.parent() {
            File::open(parent)?.sync_all()?;
        }
        let push = private()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(self.file(run_folder::PUSH_LOCK))?;
        let mut waited = Duration::ZERO;
        while let Err(error) = flock(&push, FlockOperation::NonBlockingLockExclusive) {
            if error != Errno::WOULDBLOCK {
                return Err(error.into());
            }
            if waited >= PUSH {
                return Ok(false);
            }
            sleep(AGAIN);
            waited += AGAIN;
        }
        Ok(true)
    }

    /// The lock, unless a builder (or what is left of one) has it.
    pub(crate) fn take_lock(&self) -> io::Result<Option<File>> {
        let lock = private()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(self.file(run_folder::LOCK))?;
        loop {
            match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(Some(lock)),
                // Those who only look hold it shared, for an instant.
                Err(Errno::WOULDBLOCK) if self.is_free(run_folder::LOCK)? => sleep(AGAIN),
                Err(Errno::WOULDBLOCK) => return Ok(None),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Removes everything but the revocation.
    pub(crate) fn empty(&self) -> io::Result<()> {
        for entry in fs::read_dir(&self.path)? {
            let entry = entry?;
            if entry.file_name() == run_folder::REVOKED {
                continue;
            }
            gone(if entry.file_type()?.is_dir() {
                fs::remove_dir_all(entry.path())
            } else {
                fs::remove_file(entry.path())
            })?;
        }
        Ok(())
    }

    /// When the run was revoked, if all else of it is removed.
    pub(crate) fn only_revoked(&self) -> io::Result<Option<SystemTime>> {
        if self.has(run_folder::OUTPUT)? || self.has(run_folder::WORK)? {
            return Ok(None);
        }
        let revoked = gone(fs::metadata(self.file(run_folder::REVOKED)).map(Some))?;
        revoked.map(|file| file.modified()).transpose()
    }

    /// When something of the run was last written.
    pub(crate) fn changed(&self) -> io::Result<SystemTime> {
        let folder = fs::metadata(&self.path)?.modified()?;
        let output = gone(fs::metadata(self.file(run_folder::OUTPUT)).map(Some))?;
        let output = output.map(|output| output.modified()).transpose()?;
        Ok(output.map_or(folder, |output| output.max(folder)))
    }

    /// What holds the run's lock, as far as this user can see: pid and program.
    pub(crate) fn processes(&self) -> io::Result<Vec<(Pid, String)>> {
        gone(kill::names(&self.file(run_folder::LOCK)))
    }

    /// The output from a byte on, at most `max`; none if there is no output.
    pub(crate) fn read(&self, from: u64, max: usize) -> io::Result<Option<Piece>> {
        let Some(file) = gone(File::open(self.file(run_folder::OUTPUT)).map(Some))? else { return Ok(None) };
        // Looked at before the reading: what is free now has written everything.
        let over = self.holder()? == Holder::Nobody;
        let length = file.metadata()?.len();
        let there = usize::try_from(length.saturating_sub(from)).unwrap_or(usize::MAX);
        let mut bytes = vec![0; there.min(max)];
        file.read_exact_at(&mut bytes, from)?;
        Ok(Some(Piece { bytes, end: over && there <= max }))
    }

    fn make(&self) -> io::Result<()> {
        DirBuilder::new().recursive(true).mode(0o700).create(&self.path)
    }

    fn is_free(&self, name: &str) -> io::Result<bool> {
        let Some(file) = gone(File::open(self.file(name)).map(Some))? else { return Ok(true) };
        match flock(&file, FlockOperation::NonBlockingLockShared) {
            Ok(()) => Ok(true),
            Err(Errno::WOULDBLOCK) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    fn write(&self, name: &str, content: &impl Serialize) -> io::Result<()> {
        private()
            .write(true)
            .create(true)
            .truncate(true)
            .open(self.file(name))?
            .write_all(&serde_json::to_vec(content)?)
    }
}

/// Removes the revocations of removed runs that are older than `age`. One that can't be removed is told of, and hinders no other:
/// nothing depends on their going soon. What is no run's (a disk's `lost+found`) is let be.
pub(crate) fn forget_revoked(runs: &Path, now: SystemTime, age: Duration) {
    let forget = |folder: &Folder| match folder.only_revoked()? {
        Some(written) if now.duration_since(written).is_ok_and(|since| since > age) => {
            gone(fs::remove_dir_all(folder.path()))
        }
        _ => Ok(()),
    };
    let entries = match fs::read_dir(runs) {
        Ok(entries) => entries,
        // Before the first run there is none.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return,
        Err(error) => return tracing::warn!("cannot sweep {}: {error}", runs.display()),
    };
    for entry in entries.flatten() {
        let is_run = entry.file_name().to_str().is_some_and(|name| name.parse::<RunId>().is_ok());
        let folder = Folder::new(entry.path());
        if is_run && let Err(error) = forget(&folder) {
            tracing::warn!("cannot remove the old revocation in {}: {error}", folder.path().display());
        }
    }
}

/// For files that only this user may read.
fn private() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.mode(0o600);
    options
}

/// What is not there is no error, but nothing.
fn gone<T: Default>(result: io::Result<T>) -> io::Result<T> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(T::default()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use kiln_domain::id::{BuildId, ImageKey};

    use super::*;

    #[test]
    fn revocations_of_removed_runs_are_forgotten_after_their_time() {
        let runs = tempfile::tempdir().unwrap();
        let run = |number: u8| RunId::new(&BuildId::new(&ImageKey::of("a/b:1"), [number; 10]), 1);
        let folder = |number: u8| Folder::new(runs.path().join(run(number).as_str()));
        let (old, kept, young) = (folder(1), folder(2), folder(3));
        // What somebody else left there, and what only looks like a run.
        fs::write(runs.path().join("notes.txt"), "").unwrap();
        for number in 4..20 {
            fs::write(folder(number).path(), "").unwrap();
        }
        let foreign = Folder::new(runs.path().join("lost+found"));
        assert!(foreign.revoke().unwrap());
        for folder in [&old, &kept, &young] {
            assert!(folder.revoke().unwrap());
        }
        // Its run was never removed.
        fs::write(kept.file(run_folder::OUTPUT), "").unwrap();
        let day = Duration::from_secs(86_400);
        let now = fs::metadata(young.file(run_folder::REVOKED)).unwrap().modified().unwrap();
        for folder in [&old, &kept, &foreign] {
            let file = File::options().write(true).open(folder.file(run_folder::REVOKED)).unwrap();
            file.set_modified(now - 2 * day).unwrap();
        }
        forget_revoked(runs.path(), now, day);
        let left = [&old, &kept, &young, &foreign].map(|folder| folder.exists().unwrap());
        assert_eq!(left, [false, true, true, true]);
    }
}
