//! A build's credentials are nowhere but where they are used.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::time::Duration;

use anyhow::{Result, ensure};
use futures::StreamExt as _;
use kiln_bus::events::{From, subscribe};
use kiln_domain::run_folder;
use kiln_proto::kiln_v1 as api;

use super::{DOCKERFILE, Stage, begun, dockerfile, is_over};

/// What the Dockerfile says aloud, as a careless one may.
const SAID: &str = "hunter2-is-a-long-enough-password";
/// `user:` and [`SAID`].
const SAID_PAIR: &str = "dXNlcjpodW50ZXIyLWlzLWEtbG9uZy1lbm91Z2gtcGFzc3dvcmQ=";
/// What nobody says.
const UNSAID: &str = "battery-staple-for-the-registry";
/// `ann:` and [`UNSAID`].
const UNSAID_PAIR: &str = "YW5uOmJhdHRlcnktc3RhcGxlLWZvci10aGUtcmVnaXN0cnk=";

#[tokio::test(flavor = "multi_thread")]
async fn a_password_is_in_no_log_event_argument_or_file_that_stays() -> Result<()> {
    let stage = Stage::set().await?;
    let echo = format!("{DOCKERFILE}RUN [\"/bin/busybox\", \"echo\", \"{SAID}\"]\n");
    let repository = stage.workshop.repository(&[("Dockerfile", &echo)], &["."])?;
    let pairs = [("registry.example:5000", SAID_PAIR), ("other.example", UNSAID_PAIR)];
    let auth = api::RegistryAuth {
        credentials: pairs.map(|(host, pair)| (host.to_owned(), pair.to_owned())).into(),
        ..Default::default()
    };
    let request = api::BuildImageRequest { auth: Some(auth), ..dockerfile(&repository.uri, |_| {}) };
    let mut arguments = BTreeSet::new();
    let (log, over) = tokio::select! {
        done = async {
            let build = begun(stage.ask(request).await?)?;
            let log = stage.kiln.whole_log(&build.id).await?;
            anyhow::Ok((log, stage.kiln.until(&build.id, is_over).await?))
        } => done?,
        watched = note_arguments(&mut arguments) => return watched,
    };
    ensure!(over.state() == api::BuildState::Succeeded, "{over:?}");

    let text = String::from_utf8_lossy(&log);
    ensure!(holds(&log).is_none(), "{text}");
    ensure!(holds(format!("{over:?}").as_bytes()).is_none());
    ensure!(holds(stage.kiln.log().as_bytes()).is_none(), "{}", stage.kiln.log());

    ensure!(
        arguments.iter().any(|line| line.contains("--authfile")),
        "the builder's tool was not seen at work"
    );
    // The step's own process has what the Dockerfile says in its arguments.
    let shown = |line: &&String| [SAID_PAIR, UNSAID, UNSAID_PAIR].iter().any(|secret| line.contains(secret));
    let shown: Vec<_> = arguments.iter().filter(shown).collect();
    ensure!(shown.is_empty(), "{shown:?}");

    let mut events = pin!(subscribe(&stage.kiln.endpoint("nats")?, From::Beginning).await?);
    while let Some(event) = events.next().await {
        let event = event?;
        ensure!(holds(format!("{event:?} {}", event.data).as_bytes()).is_none(), "{event:?}");
        if event.data["state"] == "SUCCEEDED" {
            break;
        }
    }

    let nats = files(&stage.kiln.data().join("nats"))?;
    ensure!(!nats.is_empty());
    ensure!(with_secret(&nats).is_empty(), "{:?}", with_secret(&nats));
    // What the builder was given, and made of it for its tools, goes once the log is complete.
    let runs = stage.kiln.data().join("runs");
    ensure!(runs.is_dir());
    kiln_testkit::workshop::until("the run's secrets are removed", || {
        let files = files(&runs)?;
        Ok(!files.iter().any(|path| is_for_secrets(path)) && with_secret(&files).is_empty())
    })
    .await?;
    // The layers and the registry have the Dockerfile's words, and no others.
    let unsaid = |path: &PathBuf| {
        std::fs::read(path).is_ok_and(|content| has(&content, UNSAID) || has(&content, UNSAID_PAIR))
    };
    let left: Vec<_> = files(&stage.kiln.data())?.into_iter().filter(unsaid).collect();
    ensure!(left.is_empty(), "{left:?}");
    Ok(())
}

/// Notes the arguments of every process of this machine, until it is dropped.
async fn note_arguments(seen: &mut BTreeSet<String>) -> Result<()> {
    loop {
        for process in std::fs::read_dir("/proc")?.flatten() {
            let is_process = process.file_name().to_string_lossy().bytes().all(|b| b.is_ascii_digit());
            // Ended meanwhile, or a thread of the kernel.
            let Some(line) = std::fs::read(process.path().join("cmdline"))
                .ok()
                .filter(|line| is_process && !line.is_empty())
            else {
                continue;
            };
            seen.insert(String::from_utf8_lossy(&line).replace('\0', " "));
        }
        tokio::time::sleep(Duration::from_millis(3)).await;
    }
}

/// Whether a file of this name is made to hold secrets.
fn is_for_secrets(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    [run_folder::SECRETS, "auth.json", "git-credentials"].contains(&&*name) || name.starts_with("secret-")
}

fn with_secret(files: &[PathBuf]) -> Vec<(&PathBuf, &'static str)> {
    // A file may have been removed meanwhile.
    files.iter().filter_map(|path| Some((path, holds(&std::fs::read(path).ok()?)?))).collect()
}

/// The secret that a text holds, plain or as the request had it.
fn holds(text: &[u8]) -> Option<&'static str> {
    [SAID, SAID_PAIR, UNSAID, UNSAID_PAIR].into_iter().find(|secret| has(text, secret))
}

fn has(text: &[u8], secret: &str) -> bool {
    text.windows(secret.len()).any(|window| window == secret.as_bytes())
}

/// The files under a folder, as far as they aren't removed meanwhile; no symlinks.
fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        let entries = match std::fs::read_dir(&folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error.into()),
        };
        for entry in entries.flatten() {
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => folders.push(entry.path()),
                Ok(kind) if kind.is_file() => files.push(entry.path()),
                _ => {}
            }
        }
    }
    Ok(files)
}
