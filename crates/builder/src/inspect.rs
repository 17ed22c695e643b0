//! An examination of what builders need on their host, and of what killed ones left in the build tool's storage.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use kiln_domain::finding::Finding;
use kiln_domain::run_folder::Settings;
use rustix::process::geteuid;
use tokio::process::Command;

use crate::buildah::{Storage, boot_id};
use crate::buildkit::Place;
use crate::choice::{Tool, choose, missing};
use crate::{leftovers, programs};

const TOOL: &str = "build tool";
/// How long a program may take to say its version.
const VERSION: Duration = Duration::from_secs(5);

const NAMESPACES: &str = "without root this needs user namespaces (`sysctl user.max_user_namespaces`, and \
     kernel.unprivileged_userns_clone or AppArmor's kernel.apparmor_restrict_unprivileged_userns), newuidmap (`apt install \
     uidmap`) and lines for this user in /etc/subuid and /etc/subgid";

/// The programs that a builder runs, and whether the build tool can stack layers in `settings.storage`.
pub async fn tools(settings: &Settings) -> Vec<Finding> {
    if choose(settings) == Ok(Tool::Buildkit) {
        let (git, buildctl) = tokio::join!(git(), buildctl(settings));
        return vec![git, buildctl, daemon(settings)];
    }
    let (git, buildah, user, isolation, storage) = tokio::join!(
        git(),
        program(
            "buildah",
            "install it on the engine's host (`apt install buildah`), on the PATH of the orchestrators there",
        ),
        user(),
        isolation(settings),
        storage(settings),
    );
    let tool = choose(settings).map_or_else(
        |problem| Finding::problem(TOOL, problem, "or set `engine.local.builder` to `auto` or `buildah`"),
        |tool| match missing(settings) {
            Some(program) => {
                Finding::ok(TOOL, format!("{}, as `{program}` is not there for BuildKit", tool.name()))
            }
            None => Finding::ok(TOOL, format!("{}, as configured", tool.name())),
        },
    );
    vec![git, tool, buildah, user, isolation, storage]
}

async fn git() -> Finding {
    program(
        "git",
        "install git on every host of a resolver or a builder (`apt install git`), on the PATH of the roles",
    )
    .await
}

async fn buildctl(settings: &Settings) -> Finding {
    let remedy = "see whether it runs by hand; `scripts/bootstrap --buildkit` brings it";
    match programs::find("buildctl", settings.programs.as_deref()) {
        Some(found) => match first_line(&found.display().to_string(), "--version").await {
            Ok(says) => Finding::ok(TOOL, format!("buildkit, by {says}")),
            Err(error) => Finding::problem(TOOL, format!("{}: {error}", found.display()), remedy),
        },
        None => Finding::problem(TOOL, "buildctl is not there", remedy),
    }
}

/// Whether the own daemon lives; it need not, as the next build starts it.
fn daemon(settings: &Settings) -> Finding {
    const PART: &str = "buildkitd";
    let addresses = &settings.buildkit.addresses;
    if !addresses.is_empty() {
        return Finding::ok(PART, format!("not Kiln's own: {}", addresses.join(", ")));
    }
    let place = Place::of(settings);
    let socket = place.socket();
    match std::os::unix::net::UnixStream::connect(&socket) {
        Ok(_) => Finding::ok(PART, format!("answers at {}", socket.display())),
        Err(_) if !place.is_kept().unwrap_or(false) => {
            Finding::ok(PART, "not started: the next build does that")
        }
        Err(error) => Finding::problem(
            PART,
            format!("lives, and does not answer at {}: {error}", socket.display()),
            format!(
                "see {}; `fuser -k {}` ends it",
                place.log().display(),
                place.folder().join("keeper.lock").display()
            ),
        ),
    }
}

/// Whether a program is there, by what it says of its version.
async fn program(name: &str, remedy: &str) -> Finding {
    match first_line(name, "--version").await {
        Ok(says) => Finding::ok(name, says),
        Err(error) => Finding::problem(name, error, remedy),
    }
}

/// Steps need user ids of their own, which root has, and others are lent. buildah warns of a lack and goes on, to fail at
/// the first RUN.
async fn user() -> Finding {
    const PART: &str = "user ids";
    if geteuid().is_root() {
        return Finding::ok(PART, "root has all of them");
    }
    let mut command = Command::new("buildah");
    command.args(["unshare", "cat", "/proc/self/uid_map"]);
    match output(command).await.map(|map| mapped(&map)) {
        Ok(many) if many > 1 => Finding::ok(PART, format!("{many} are lent to this user")),
        Ok(_) => Finding::problem(
            PART,
            "none are lent to this user, so steps that run something fail",
            "as root: usermod --add-subuids 100000-165535 --add-subgids 100000-165535 USER, and `apt install uidmap`; or run the orchestrator as root",
        ),
        Err(error) => Finding::problem(PART, format!("a user namespace can't be made: {error}"), NAMESPACES),
    }
}

/// How many ids a uid_map maps: user_namespaces(7), the third number of each line.
fn mapped(map: &str) -> u64 {
    map.lines().filter_map(|line| line.split_whitespace().nth(2)?.parse::<u64>().ok()).sum()
}

/// Only two of the kinds of isolation run another program.
async fn isolation(settings: &Settings) -> Finding {
    const PART: &str = "isolation";
    let kind = &settings.isolation;
    if kind == "chroot" {
        return Finding::ok(PART, "chroot, which needs no further program");
    }
    let mut tried = Vec::new();
    for runtime in ["crun", "runc"] {
        match first_line(runtime, "--version").await {
            Ok(says) => return Finding::ok(PART, format!("{kind}, by {says}")),
            Err(error) => tried.push(error),
        }
    }
    Finding::problem(
        PART,
        format!("{kind} needs an OCI runtime: {}", tried.join("; ")),
        "install runc or crun, or set `engine.local.isolation` to `chroot`",
    )
}

/// Asks the build tool itself, with an empty storage beside the real one.
async fn storage(settings: &Settings) -> Finding {
    const PART: &str = "build storage";
    let driver = &settings.storage_driver;
    let elsewhere = "run this on the engine's host, as its user, after the engine has been started there";
    let trial = settings.storage.join(format!("doctor-{}", std::process::id()));
    if let Err(error) = std::fs::create_dir(&trial) {
        return Finding::unchecked(
            PART,
            format!("can't try it in {}: {error}", settings.storage.display()),
            elsewhere,
        );
    }
    let mut command = Command::new("buildah");
    command.arg("--root").arg(trial.join("root")).arg("--runroot").arg(trial.join("run"));
    command.args(["--storage-driver", driver, "info"]).env("TMPDIR", &trial);
    let answer = output(command).await;
    let cleared = leftovers::remove_folder(&trial);
    match (answer, cleared) {
        (Ok(_), Ok(())) => Finding::ok(PART, format!("{driver} works in {}", settings.storage.display())),
        (Ok(_), Err(error)) => Finding::warning(
            PART,
            format!("{driver} works; but {} can't be removed: {error}", trial.display()),
            "unmount what is mounted there, and remove it",
        ),
        (Err(error), _) => {
            let user = if geteuid().is_root() {
                "see whether this kernel has overlayfs (`modprobe overlay`)"
            } else {
                NAMESPACES
            };
            Finding::problem(
                PART,
                format!("buildah can't use {driver} in {}: {error}", settings.storage.display()),
                format!(
                    "{user}; or set `engine.local.storage_driver` to `vfs`, which works everywhere, slower"
                ),
            )
        }
    }
}

/// What runs left in the build tool's storage and mounted under `runs`. `in_hand` tells of a run, by its folder's name,
/// whether its build is in hand; `live`: some run's builder lives, so that what is mounted may be in use.
pub fn leftovers(
    runs: &Path,
    settings: &Settings,
    in_hand: impl Fn(&str) -> bool,
    live: bool,
) -> Vec<Finding> {
    const CONTAINERS: &str = "containers";
    const MOUNTS: &str = "mounts";
    let storage = Storage::of(settings);
    // As builders name it.
    let runs = &runs.canonicalize().unwrap_or_else(|_| runs.to_owned());
    let mut findings = Vec::new();
    let mut left: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (container, run) in storage.containers(runs) {
        if !in_hand(&run) {
            left.entry(run).or_default().push(container);
        }
    }
    for (run, containers) in left {
        findings.push(Finding::warning(
            CONTAINERS,
            format!("{} containers of run `{run}` are left in the build tool's storage", containers.len()),
            format!(
                "they go with the run's folder, if it is still there; else: {} rm {}",
                storage.command_line(),
                containers.join(" ")
            ),
        ));
    }
    match mounts_left(runs, &storage.root(), &in_hand, live) {
        Ok(mounts) => findings.extend(mounts.iter().map(|mount| {
            Finding::warning(
                MOUNTS,
                format!("{} is mounted, and no builder that lives uses it", mount.display()),
                format!(
                    "it goes with the run's folder or at a restart of the host; else: umount -l '{}'",
                    mount.display()
                ),
            )
        })),
        Err(error) => findings.push(Finding::unchecked(
            MOUNTS,
            format!("what is mounted can't be read: {error}"),
            "run this on a Linux host with /proc",
        )),
    }
    let old: Vec<PathBuf> = boot_id().map(|boot| storage.old_run_roots(&boot)).unwrap_or_default();
    if let Some(first) = old.first() {
        findings.push(Finding::warning(
            CONTAINERS,
            format!("{} folders of notes of former boots are left, {} for one", old.len(), first.display()),
            "the next build removes them",
        ));
    }
    if findings.is_empty() {
        findings.push(Finding::ok(CONTAINERS, "none of a run that is over"));
        findings.push(Finding::ok(MOUNTS, "none of a run that is over"));
    }
    findings
}

fn mounts_left(
    runs: &Path,
    root: &Path,
    in_hand: &impl Fn(&str) -> bool,
    live: bool,
) -> std::io::Result<Vec<PathBuf>> {
    let of_runs = leftovers::mounts_under(runs)?.into_iter().filter(|mount| {
        let run = mount.strip_prefix(runs).ok().and_then(|inner| inner.iter().next()?.to_str());
        !run.is_some_and(in_hand)
    });
    // Which run a container's file system belongs to isn't told by its name.
    let layers = if live { Vec::new() } else { leftovers::mounts_under(root)? };
    Ok(of_runs.chain(layers.into_iter().filter(|mount| mount.ends_with("merged"))).collect())
}

async fn first_line(program: &str, argument: &str) -> Result<String, String> {
    let mut command = Command::new(program);
    command.arg(argument);
    let text = output(command).await.map_err(|error| format!("{program}: {error}"))?;
    Ok(text.lines().next().unwrap_or_default().trim().to_owned())
}

/// A command's standard output, or what went wrong.
async fn output(mut command: Command) -> Result<String, String> {
    command.stdin(Stdio::null()).kill_on_drop(true);
    match tokio::time::timeout(VERSION, command.output()).await {
        Err(_) => Err(format!("no answer within {} s", VERSION.as_secs())),
        Ok(Err(error)) if error.kind() == std::io::ErrorKind::NotFound => Err("not found on the PATH".into()),
        Ok(Err(error)) => Err(format!("can't be run: {error}")),
        Ok(Ok(ended)) if ended.status.success() => Ok(String::from_utf8_lossy(&ended.stdout).into_owned()),
        Ok(Ok(ended)) => {
            let errors = String::from_utf8_lossy(&ended.stderr);
            let first = errors.lines().next().unwrap_or_default().trim();
            Err(if first.is_empty() { ended.status.to_string() } else { first.to_owned() })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lent_ids_are_counted() {
        for (map, many) in [
            ("         0      65534          1\n", 1),
            ("         0       1000          1\n         1     100000      65536\n", 65_537),
            ("", 0),
        ] {
            assert_eq!(mapped(map), many, "{map:?}");
        }
    }
}
