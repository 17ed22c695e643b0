//! Kiln's own BuildKit daemon: it outlives builders, is found again, and ends by itself.

use std::fs::File;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use kiln_domain::failure::FailureReason::Internal;
use kiln_domain::run::{RunSecrets, RunSpec};
use kiln_domain::run_folder;
use kiln_testkit::workshop::{Repository, Workshop, until};
use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, Signal, kill_process};

use crate::run::{Run, failed, pushed, run};

const SLEEPS: &str = "FROM scratch\nCOPY busybox /bin/busybox\n\
     RUN [\"/bin/busybox\", \"sh\", \"-c\", \"echo it sleeps now; exec /bin/busybox sleep 3601\"]\n";
const QUICK: &str = "FROM scratch\nCOPY Dockerfile /\n";

async fn sleeping(workshop: &Workshop) -> Result<(Run, RunSpec)> {
    let repository = workshop.repository(&[("Dockerfile", SLEEPS)], &["."])?;
    let spec = workshop.build(&repository, |_| {})?;
    let mut run = Run::prepare(workshop, &spec, &RunSecrets::default())?;
    run.start()?;
    until("the step runs", || Ok(run.output().contains(" it sleeps now\n"))).await?;
    Ok((run, spec))
}

fn quick(workshop: &Workshop) -> Result<Repository> {
    workshop.repository(&[("Dockerfile", QUICK)], &[])
}

/// The processes whose arguments name this folder, and their parents' pids.
fn processes(of: &str, folder: &Path) -> Result<Vec<(Pid, i32)>> {
    let mut found = Vec::new();
    for process in std::fs::read_dir("/proc")?.flatten() {
        let Some(pid) = process.file_name().to_str().and_then(|pid| Pid::from_raw(pid.parse().ok()?)) else {
            continue;
        };
        let arguments = std::fs::read(process.path().join("cmdline")).unwrap_or_default();
        let arguments = String::from_utf8_lossy(&arguments);
        if arguments.contains(of) && arguments.contains(&*folder.to_string_lossy()) {
            let status = std::fs::read_to_string(process.path().join("status")).unwrap_or_default();
            let parent = status.lines().find_map(|line| line.strip_prefix("PPid:")?.trim().parse().ok());
            found.push((pid, parent.unwrap_or_default()));
        }
    }
    Ok(found)
}

/// The steps of [`SLEEPS`] that run in this place's daemon.
fn sleepers(workshop: &Workshop) -> Result<usize> {
    let mut count = 0;
    let storage = workshop.storage().display().to_string();
    for process in std::fs::read_dir("/proc")?.flatten() {
        let arguments = std::fs::read(process.path().join("cmdline")).unwrap_or_default();
        let root = std::fs::read_to_string(process.path().join("mountinfo")).unwrap_or_default();
        count += usize::from(arguments == b"/bin/busybox\0sleep\x003601\0" && root.contains(&*storage));
    }
    Ok(count)
}

#[tokio::test(flavor = "multi_thread")]
async fn stops_leave_the_daemon_and_no_step() -> Result<()> {
    let Some(workshop) = Workshop::with_buildkit(kiln_builder::missing).await? else { return Ok(()) };
    let storage = workshop.storage();
    let (mut cancelled, _) = sleeping(&workshop).await?;
    let daemon = processes("--config", &storage)?;
    ensure!(daemon.len() == 1, "one daemon, not {daemon:?}");
    let keeper = processes("keep-buildkitd", &storage)?;
    let parent = keeper.first().context("no keeper")?.1;
    ensure!(Some(parent) != cancelled.pid(), "the keeper is a child of the builder");

    cancelled.touch(run_folder::CANCEL)?;
    ensure!(cancelled.wait()? == Some(1), "{}", cancelled.output());
    failed(&cancelled.outcome()?, Internal)?;
    until("the step has ended", || Ok(sleepers(&workshop)? == 0)).await?;

    let (mut killed, spec) = sleeping(&workshop).await?;
    let builder = killed.pid().and_then(Pid::from_raw).context("no pid")?;
    kill_process(builder, Signal::KILL)?;
    killed.wait()?;
    // What a dead builder left of its children is the engine's to kill.
    for line in workshop.processes(&spec.run)? {
        let pid = line.split(' ').next().and_then(|pid| Pid::from_raw(pid.parse().ok()?));
        kill_process(pid.context("no pid")?, Signal::KILL)?;
    }
    until("its step has ended", || Ok(sleepers(&workshop)? == 0)).await?;

    let (outcome, _) = run(&workshop, &workshop.build(&quick(&workshop)?, |_| {})?, &RunSecrets::default())?;
    pushed(&outcome)?;
    ensure!(processes("--config", &storage)? == daemon, "another daemon");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_that_dies_says_nothing_of_the_build() -> Result<()> {
    let Some(workshop) = Workshop::with_buildkit(kiln_builder::missing).await? else { return Ok(()) };
    let (mut lost, _) = sleeping(&workshop).await?;
    for (daemon, _) in processes("--config", &workshop.storage())? {
        kill_process(daemon, Signal::KILL)?;
    }
    ensure!(lost.wait()? == Some(6), "{}", lost.output());
    ensure!(!lost.has(run_folder::OUTCOME) && lost.output().contains("daemon is gone"), "{}", lost.output());

    until("its steps have ended", || Ok(sleepers(&workshop)? == 0)).await?;

    // The next one has another daemon.
    let (outcome, _) = run(&workshop, &workshop.build(&quick(&workshop)?, |_| {})?, &RunSecrets::default())?;
    pushed(&outcome)?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_daemon_ends_and_is_started_again() -> Result<()> {
    let Some(workshop) = Workshop::with_buildkit(kiln_builder::missing).await? else { return Ok(()) };
    let folder = workshop.storage().join("buildkit");
    for _ in 0..2 {
        let spec = workshop.build(&quick(&workshop)?, |_| {})?;
        let mut quick = Run::prepare(&workshop, &spec, &RunSecrets::default())?;
        let settings = quick.folder.join(run_folder::SETTINGS);
        let text = std::fs::read_to_string(&settings)?;
        std::fs::write(&settings, text.replace("\"idle_seconds\":60", "\"idle_seconds\":0"))?;
        quick.start()?;
        ensure!(quick.wait()? == Some(0), "{}", quick.output());
        let lock = File::open(folder.join("keeper.lock"))?;
        until("the daemon ends", || Ok(flock(&lock, FlockOperation::NonBlockingLockShared).is_ok())).await?;
        ensure!(!folder.join("buildkitd.sock").exists(), "its socket is left");
    }
    Ok(())
}

/// Builders that begin at once share one daemon.
#[tokio::test(flavor = "multi_thread")]
async fn many_at_once_start_one_daemon() -> Result<()> {
    let Some(workshop) = Workshop::with_buildkit(kiln_builder::missing).await? else { return Ok(()) };
    let repository = quick(&workshop)?;
    let mut runs = Vec::new();
    for _ in 0..4 {
        let spec = workshop.build(&repository, |_| {})?;
        let mut run = Run::prepare(&workshop, &spec, &RunSecrets::default())?;
        run.start()?;
        runs.push(run);
    }
    for mut run in runs {
        ensure!(run.wait()? == Some(0), "{}", run.output());
    }
    ensure!(processes("--config", &workshop.storage())?.len() == 1);
    Ok(())
}

/// Daemons by address: the next one where the first doesn't answer.
#[tokio::test(flavor = "multi_thread")]
async fn of_several_daemons_one_that_answers() -> Result<()> {
    let Some(workshop) = Workshop::with_buildkit(kiln_builder::missing).await? else { return Ok(()) };
    // Starts Kiln's own, which here stands for one elsewhere.
    let repository = quick(&workshop)?;
    pushed(&run(&workshop, &workshop.build(&repository, |_| {})?, &RunSecrets::default())?.0)?;
    let there = format!("unix://{}", workshop.storage().join("buildkit/buildkitd.sock").display());
    for (addresses, exit) in [
        (vec!["unix:///nowhere/1", "unix:///nowhere/2", &there, "unix:///nowhere/3"], 0),
        (vec!["unix:///nowhere/1", "tcp://127.0.0.1:1"], 6),
    ] {
        let mut run = Run::prepare(&workshop, &workshop.build(&repository, |_| {})?, &RunSecrets::default())?;
        let mut settings = workshop.settings();
        settings.buildkit.addresses = addresses.into_iter().map(str::to_owned).collect();
        std::fs::write(run.folder.join(run_folder::SETTINGS), serde_json::to_vec(&settings)?)?;
        run.start()?;
        ensure!(run.wait()? == Some(exit), "{}", run.output());
    }
    Ok(())
}
