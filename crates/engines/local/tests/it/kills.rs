//! Builders that die, and builders that won't.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use kiln_domain::engine::{Cursor, Engine, EngineError, Observed};
use kiln_domain::id::RunId;
use kiln_domain::run::{RunResult, RunSecrets, RunSpec, Work};
use kiln_domain::run_folder;
use kiln_engine_local::LocalEngine;
use kiln_testkit::engine_conformance::{ENDLESS, Job, Place};
use kiln_testkit::front::{Front, Reply};
use kiln_testkit::wire::Wire;
use kiln_testkit::workshop::until;
use rustix::process::{Pid, Signal, kill_process};
use tokio::sync::watch;

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

/// Cancelled and revoked while the registry holds its PUT, far beyond the grace: neither is done before the PUT is over, and then
/// what the run says of itself is what the registry has.
#[tokio::test(flavor = "multi_thread")]
async fn a_builder_is_not_killed_in_its_put_and_revoked_only_after_it() -> Result<()> {
    let place = LocalPlace::new().await?.with_grace(Duration::from_millis(100));
    let (let_go, held) = watch::channel(false);
    let upstream = place.workshop.registry.address().to_owned();
    let front = Front::start(move |asked| match asked.is("PUT", "/workspace/manifests/") {
        true => Reply::ForwardOnce(held.clone(), upstream.clone()),
        false => Reply::Forward(upstream.clone()),
    })
    .await?;
    let (engine, (mut spec, secrets)) = (place.local(), place.job(Job::Succeeds)?);
    let target = spec.target_ref.to_string();
    spec.target_ref = target.replace(place.workshop.registry.address(), &front.address).parse()?;
    let handle = engine.start(&spec, &secrets).await?;
    until("the PUT has begun", || Ok(front.count("PUT", "/workspace/manifests/") == 1)).await?;
    engine.cancel(&spec.run).await?;
    let revoked = engine.revoke(&spec.run).await;
    ensure!(matches!(revoked, Err(EngineError::Unavailable(_))), "{revoked:?} while the PUT is under way");
    ensure!(
        engine.observe(&spec.run).await? == Observed::Running(handle.clone()),
        "it was killed in its PUT"
    );
    let_go.send_replace(true);
    engine.revoke(&spec.run).await?;
    let there = place.pushed(&spec).await?;
    let ended = tokio::time::timeout(LONG, engine.ended(&spec.run, &handle)).await??;
    let reported = ended.outcome.map(|outcome| outcome.result);
    ensure!(there.is_some() && reported == there.map(RunResult::Pushed), "it says {reported:?}");
    engine.remove(&spec.run).await?;
    engine.close().await;
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

/// Where a builder is when it is killed.
#[derive(Clone, Copy, Debug)]
enum Phase {
    Fetch,
    Step,
    Commit,
    Push,
}

/// A job that stays in a phase, and what its output says once it is there.
fn staying_in(place: &LocalPlace, wire: &Wire, phase: Phase) -> Result<(RunSpec, &'static str)> {
    let (mut spec, _) = place.job(if matches!(phase, Phase::Step) { Job::Endless } else { Job::Succeeds })?;
    let Work::Build { source, base_ref, .. } = &mut spec.work else { bail!("no build") };
    let said = match phase {
        Phase::Fetch => {
            source.remote_uri = format!("http://{}/team/app.git", wire.address());
            "fetching"
        }
        Phase::Step => ENDLESS,
        Phase::Commit => {
            source.path = "large".into();
            "all is written"
        }
        Phase::Push => {
            *base_ref = format!("{}/base:x", wire.address()).parse()?;
            "pushing"
        }
    };
    Ok((spec, said))
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_left_of_a_builder_that_was_killed_wherever_it_was() -> Result<()> {
    let place = LocalPlace::new().await?.with_grace(Duration::from_millis(500));
    // It takes connections, and no answer ever comes back.
    let wire = Wire::to(place.workshop.registry.address()).await?;
    wire.lose_answers();
    let engine = place.local();
    let temporary = temporary_files();
    for phase in [Phase::Fetch, Phase::Step, Phase::Commit, Phase::Push] {
        for with_its_tools in [false, true] {
            let (spec, said) = staying_in(&place, &wire, phase)?;
            let handle = engine.start(&spec, &RunSecrets::default()).await?;
            let output = place.workshop.runs().join(spec.run.as_str()).join(run_folder::OUTPUT);
            let line = format!("\n{said}");
            let lines = [line.clone(), line.replace('\n', "\nkiln: ")];
            let there = || {
                let output = std::fs::read_to_string(&output).unwrap_or_default();
                Ok(lines.iter().any(|line| output.contains(line)))
            };
            until(&format!("{phase:?}"), there).await?;
            signal_builder(&place, &spec.run, Signal::KILL)?;
            if with_its_tools {
                kill_all(&place, &spec.run)?;
            }
            let ended = tokio::time::timeout(LONG, engine.ended(&spec.run, &handle)).await??;
            ensure!(ended.outcome.is_none() && ended.recorded.is_none(), "{phase:?}: it left {ended:?}");
            if matches!(phase, Phase::Step) {
                // Whoever removes it dies at that, and so does the builder that clears up.
                let begun = engine.remove(&spec.run);
                let _ = tokio::time::timeout(Duration::from_millis(20), begun).await;
                kill_all(&place, &spec.run)?;
                until("its end", || Ok(processes(&place, &spec.run)?.is_empty())).await?;
            }
            until_removed(&engine, &spec.run).await?;
            let left = place.left(&spec.run)?;
            ensure!(left.is_empty(), "{phase:?}, with its tools {with_its_tools}: left {left:?}");
            let noted = notes_of_containers(&place)?;
            ensure!(noted.is_empty(), "{phase:?}, with its tools {with_its_tools}: {noted:?}");
        }
    }
    let left: Vec<_> = temporary_files().difference(&temporary).cloned().collect();
    ensure!(left.is_empty(), "{left:?}");
    engine.close().await;
    Ok(())
}

fn kill_all(place: &LocalPlace, run: &RunId) -> Result<()> {
    for (pid, _) in processes(place, run)? {
        // One that has ended by itself is as good.
        let _ = kill_process(Pid::from_raw(pid).context("pid")?, Signal::KILL);
    }
    Ok(())
}

/// As an orchestrator does, which asks again for what could not be removed.
async fn until_removed(engine: &LocalEngine, run: &RunId) -> Result<()> {
    let removing = async {
        while let Err(error) = engine.remove(run).await {
            ensure!(matches!(error, EngineError::Unavailable(_)), "{error}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(())
    };
    tokio::time::timeout(LONG, removing).await.context("it can't be removed")?
}

/// What the build tool noted of containers for this boot.
fn notes_of_containers(place: &LocalPlace) -> Result<Vec<String>> {
    let storage = place.workshop.settings().storage.join("buildah");
    let mut notes = Vec::new();
    for run_root in std::fs::read_dir(storage).into_iter().flatten().flatten() {
        let folder = run_root.path().join("overlay-containers");
        for note in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            if run_root.file_name() != "root" && note.file_type()?.is_dir() {
                notes.push(note.path().display().to_string());
            }
        }
    }
    Ok(notes)
}

/// Where the build tool puts files unless it is told otherwise.
fn temporary_files() -> BTreeSet<String> {
    let all = std::fs::read_dir("/var/tmp").into_iter().flatten().flatten();
    let names = all.map(|entry| entry.file_name().to_string_lossy().into_owned());
    names
        .filter(|name| {
            name.starts_with("buildah") || name.starts_with("storage") || name.starts_with("container")
        })
        .collect()
}
