//! Builders that die, and builders that won't.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use kiln_domain::engine::{Cursor, Engine, EngineError, Observed};
use kiln_domain::id::RunId;
use kiln_domain::run_folder;
use kiln_testkit::engine_conformance::{ENDLESS, Job, Place};
use kiln_testkit::workshop::until;
use rustix::process::{Pid, Signal, kill_process};

use crate::place::LocalPlace;

const LONG: Duration = Duration::from_secs(60);

/// The run's processes by name: `(pid, name)`.
fn processes(place: &LocalPlace, run: &RunId) -> Result<Vec<(i32, String)>> {
    let parse = |line: &String| line.split_once(' ').map(|(pid, name)| Ok((pid.parse()?, name.to_owned())));
    place.workshop.processes(run)?.iter().filter_map(parse).collect()
}

fn signal_builder(place: &LocalPlace, run: &RunId, signal: Signal) -> Result<()> {
    let found = processes(place, run)?;
    let (pid, _) = found.iter().find(|(_, name)| name == "builder").context("no builder")?;
    kill_process(Pid::from_raw(*pid).context("pid")?, signal)?;
    Ok(())
}

async fn endless_step(place: &LocalPlace, run: &RunId) -> Result<()> {
    let output = place.workshop.runs().join(run.as_str()).join(run_folder::OUTPUT);
    until("the endless step", || {
        Ok(std::fs::read_to_string(&output).unwrap_or_default().contains(&format!("\n{ENDLESS}")))
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_builder_that_was_killed_ends_only_with_its_children() -> Result<()> {
    let place = LocalPlace::new().await?.with_grace(Duration::from_secs(2));
    let (engine, (spec, secrets)) = (place.local(), place.job(Job::Endless)?);
    let handle = engine.start(&spec, &secrets).await?;
    endless_step(&place, &spec.run).await?;
    signal_builder(&place, &spec.run, Signal::KILL)?;
    until("the builder is dead", || {
        Ok(processes(&place, &spec.run)?.iter().all(|(_, name)| name != "builder"))
    })
    .await?;
    ensure!(!processes(&place, &spec.run)?.is_empty(), "its children died with it: this test tests nothing");
    ensure!(engine.observe(&spec.run).await? == Observed::Running(handle.clone()), "it has ended already");
    let ended = tokio::time::timeout(LONG, place.engine().ended(&spec.run, &handle)).await??;
    ensure!(ended.outcome.is_none() && ended.recorded.is_none(), "a dead builder left {ended:?}");
    let living = processes(&place, &spec.run)?;
    ensure!(living.is_empty(), "its children live: {living:?}");
    engine.remove(&spec.run).await?;
    ensure!(place.left(&spec.run)?.is_empty(), "it left {:?}", place.left(&spec.run)?);
    engine.close().await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_builder_that_does_not_react_is_killed_after_the_grace() -> Result<()> {
    let place = LocalPlace::new().await?.with_grace(Duration::from_secs(1));
    let (engine, (spec, secrets)) = (place.local(), place.job(Job::Endless)?);
    let handle = engine.start(&spec, &secrets).await?;
    endless_step(&place, &spec.run).await?;
    signal_builder(&place, &spec.run, Signal::STOP)?;
    // By an engine that adopted it.
    let other = place.local();
    other.cancel(&spec.run).await?;
    let ended = tokio::time::timeout(LONG, engine.ended(&spec.run, &handle)).await??;
    ensure!(ended.outcome.is_none(), "a stopped builder left {ended:?}");
    other.remove(&spec.run).await?;
    ensure!(place.left(&spec.run)?.is_empty(), "it left {:?}", place.left(&spec.run)?);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_that_came_to_nothing_can_be_made_again() -> Result<()> {
    let place = LocalPlace::new().await?;
    let (spec, secrets) = place.job(Job::Succeeds)?;
    let broken = LocalPlace::new().await?.with_program("/nowhere/kiln");
    let error = broken.local().start(&spec, &secrets).await;
    ensure!(
        matches!(&error, Err(EngineError::Unavailable(told)) if told.contains("/nowhere/kiln")),
        "{error:?}"
    );
    ensure!(broken.local().observe(&spec.run).await? == Observed::Absent, "it is there");
    let engine = place.local();
    let handle = engine.start(&spec, &secrets).await?;
    let ended = tokio::time::timeout(LONG, engine.ended(&spec.run, &handle)).await??;
    ensure!(ended.outcome.is_some(), "no outcome");
    // A cursor of another engine names no place here.
    ensure!(engine.read(&spec.run, &Cursor::new("x"), 1).await == Err(EngineError::Gone), "read");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_builder_sees_nothing_of_its_parents_environment_and_secrets_are_private() -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let place = LocalPlace::new().await?;
    let (engine, (spec, mut secrets)) = (place.local(), place.job(Job::Endless)?);
    secrets.git_password = Some("s3cret".into());
    engine.start(&spec, &secrets).await?;
    endless_step(&place, &spec.run).await?;
    let folder = place.workshop.runs().join(spec.run.as_str());
    let mode = |name: &str| anyhow::Ok(std::fs::metadata(folder.join(name))?.permissions().mode() & 0o777);
    ensure!(mode("")? == 0o700 && mode(run_folder::SECRETS)? == 0o600 && mode(run_folder::OUTPUT)? == 0o600);
    for (pid, _) in processes(&place, &spec.run)? {
        for file in ["environ", "cmdline"] {
            let text = std::fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
            let text = String::from_utf8_lossy(&text);
            ensure!(!text.contains("s3cret") && !text.contains("CARGO"), "{file}: {text}");
        }
    }
    engine.cancel(&spec.run).await?;
    until("it ends", || Ok(processes(&place, &spec.run)?.is_empty())).await?;
    ensure!(!folder.join(run_folder::SECRETS).exists(), "the secrets are left");
    Ok(())
}
