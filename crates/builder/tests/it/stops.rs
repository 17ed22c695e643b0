//! Builds that are stopped, and runs that must not go on.

use anyhow::{Context as _, Result, ensure};
use kiln_domain::failure::FailureReason::{Internal, Timeout};
use kiln_domain::run::{RunSecrets, RunSpec};
use kiln_domain::run_folder;
use kiln_testkit::front::{Front, Reply};
use kiln_testkit::workshop::{Workshop, until};
use rustix::process::{Pid, Signal, kill_process};
use tokio::sync::watch;

use crate::run::{Run, failed, pushed, run};

const SLEEPS: &str = "FROM scratch\nCOPY busybox /bin/busybox\n\
     RUN [\"/bin/busybox\", \"sh\", \"-c\", \"(/bin/busybox setsid /bin/busybox sleep 3600 &); echo it sleeps now; /bin/busybox sleep 3600\"]\n";

async fn sleeping(workshop: &Workshop, change: impl FnOnce(&mut RunSpec)) -> Result<(Run, RunSpec)> {
    let repository = workshop.repository(&[("Dockerfile", SLEEPS)], &["."])?;
    let mut spec = workshop.build(&repository, |_| {})?;
    change(&mut spec);
    let mut run = Run::prepare(workshop, &spec, &RunSecrets::default())?;
    run.start()?;
    until("the step runs", || Ok(run.output().contains("\nit sleeps now"))).await?;
    Ok((run, spec))
}

fn builder(run: &Run) -> Result<Pid> {
    run.pid().and_then(Pid::from_raw).context("no pid")
}

fn pids(workshop: &Workshop, spec: &RunSpec) -> Result<Vec<Pid>> {
    let lines = workshop.processes(&spec.run)?;
    lines
        .iter()
        .map(|line| {
            let pid = line.split(' ').next().and_then(|pid| Pid::from_raw(pid.parse().ok()?));
            pid.context("no pid")
        })
        .collect()
}

/// Kills what lives of the run, and waits until nothing does.
async fn end_all(workshop: &Workshop, spec: &RunSpec, run: &Run) -> Result<()> {
    // Again and again: one may start another meanwhile.
    let killed = || {
        for pid in pids(workshop, spec)? {
            let _ = kill_process(pid, Signal::KILL);
        }
        // A process that is about to end shows no open file any more a moment before its locks are free.
        let lock = std::fs::File::open(run.folder.join(run_folder::LOCK))?;
        Ok(rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive).is_ok())
    };
    until("they are dead", killed).await
}

fn all_is_gone(workshop: &Workshop, spec: &RunSpec) -> Result<()> {
    let processes = workshop.processes(&spec.run)?;
    ensure!(processes.is_empty(), "still there: {processes:?}");
    let left = workshop.left(&spec.run)?;
    let left: Vec<_> = left
        .into_iter()
        .filter(|left| left.starts_with("container") || left.ends_with("/merged") || left.ends_with("/work"))
        .collect();
    ensure!(left.is_empty(), "left: {left:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn by_cancel_revocation_signal_or_deadline_with_all_children() -> Result<()> {
    let workshop = Workshop::new().await?;
    for (cause, reason, part) in [
        ("cancel", Some(Internal), "cancelled"),
        ("revoked", None, "stopped: the run was revoked"),
        ("TERM", None, "stopped: the builder was told to end"),
        ("TERM to all", None, "stopped: the builder was told to end"),
        ("deadline", Some(Timeout), "took longer than 4.0 s; what ran longest: step 3/3 `RUN"),
    ] {
        let timeout_ms = if cause == "deadline" { 4_000 } else { 60_000 };
        let (mut run, spec) = sleeping(&workshop, |spec| spec.timeout_ms = timeout_ms).await?;
        match cause {
            "cancel" => run.touch(run_folder::CANCEL)?,
            "revoked" => run.touch(run_folder::REVOKED)?,
            "TERM" => kill_process(builder(&run)?, Signal::TERM)?,
            // As of a host that goes down; the tools first.
            "TERM to all" => {
                for pid in pids(&workshop, &spec)?.into_iter().filter(|pid| Some(*pid) != builder(&run).ok())
                {
                    let _ = kill_process(pid, Signal::TERM);
                }
                kill_process(builder(&run)?, Signal::TERM)?;
            }
            _ => {}
        }
        let exit = run.wait()?;
        if let Some(reason) = reason {
            ensure!(exit == Some(1), "{cause}: {}", run.output());
            let outcome = run.outcome()?;
            let failure = failed(&outcome, reason)?;
            ensure!(failure.message.contains(part), "{cause}: {failure}");
            ensure!(outcome.findings.steps.len() == 3, "{cause}: {:?}", outcome.findings.steps);
        } else {
            ensure!(exit == Some(6) && run.output().contains(part), "{cause}: {}", run.output());
            ensure!(!run.has(run_folder::OUTCOME), "{cause}: it left an outcome");
            ensure!(
                !run.has(run_folder::SECRETS) && !run.has(run_folder::WORK),
                "{cause}: it cleared nothing"
            );
        }
        ensure!(
            workshop.pushed(&spec.target_ref).await?.is_none() && !run.has(run_folder::TARGET_DIGEST),
            "{cause}: it pushed"
        );
        all_is_gone(&workshop, &spec).context(cause)?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_killed_builder_left_is_removed_by_the_next() -> Result<()> {
    let workshop = Workshop::new().await?;
    let (mut first, spec) = sleeping(&workshop, |_| {}).await?;
    kill_process(builder(&first)?, Signal::KILL)?;
    ensure!(first.wait()?.is_none());
    // Its children hold the run.
    first.start()?;
    ensure!(first.wait()? == Some(4), "{}", first.output());
    end_all(&workshop, &spec, &first).await?;
    ensure!(first.has(run_folder::WORK) && !first.has(run_folder::OUTCOME));
    first.touch(run_folder::REVOKED)?;
    first.start()?;
    ensure!(first.wait()? == Some(3), "{}", first.output());
    ensure!(!first.has(run_folder::SECRETS), "the secrets are left");
    all_is_gone(&workshop, &spec)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_is_over_or_has_no_spec_is_not_worked_on() -> Result<()> {
    let workshop = Workshop::new().await?;
    let repository = workshop.repository(&[("Dockerfile", "FROM scratch\nCOPY Dockerfile /\n")], &[])?;
    let spec = workshop.build(&repository, |_| {})?;
    let mut revoked = Run::prepare(&workshop, &spec, &RunSecrets::default())?;
    revoked.touch(run_folder::REVOKED)?;
    revoked.start()?;
    ensure!(revoked.wait()? == Some(3) && revoked.output().is_empty(), "{}", revoked.output());
    ensure!(!revoked.has(run_folder::OUTCOME) && workshop.pushed(&spec.target_ref).await?.is_none());

    let spec = workshop.build(&repository, |_| {})?;
    let (outcome, output) = run(&workshop, &spec, &RunSecrets::default())?;
    pushed(&outcome)?;
    let mut again = Run::prepare(&workshop, &spec, &RunSecrets::default())?;
    again.start()?;
    ensure!(again.wait()? == Some(3) && again.output() == output, "it was built again: {}", again.output());

    std::fs::remove_file(again.folder.join(run_folder::SPEC))?;
    again.start()?;
    ensure!(again.wait()? == Some(5), "{}", again.output());
    Ok(())
}

/// The base image is pushed, and before the target is PUT the run is revoked: the target stays as it was.
#[tokio::test(flavor = "multi_thread")]
async fn a_revocation_before_the_put_is_seen() -> Result<()> {
    let workshop = Workshop::new().await?;
    let repository = workshop.repository(&[("Dockerfile", "FROM scratch\nCOPY Dockerfile /\n")], &[])?;
    for (name, exit) in [(run_folder::REVOKED, 6), (run_folder::CANCEL, 1)] {
        let spec = workshop.build(&repository, |_| {})?;
        let mut run = Run::prepare(&workshop, &spec, &RunSecrets::default())?;
        // Whoever has the push lock keeps the builder from its PUT, and its one thread from looking elsewhere.
        let gate = std::fs::File::create(run.folder.join(run_folder::PUSH_LOCK))?;
        rustix::fs::flock(&gate, rustix::fs::FlockOperation::LockExclusive)?;
        run.start()?;
        let waits = || {
            Ok(std::fs::read_to_string("/proc/locks")?.contains("-> FLOCK")
                && run.output().contains("copying"))
        };
        until("it waits for the push lock", waits).await?;
        run.touch(name)?;
        drop(gate);
        ensure!(run.wait()? == Some(exit), "{}", run.output());
        if exit == 1 {
            failed(&run.outcome()?, Internal)?;
        } else {
            ensure!(!run.has(run_folder::OUTCOME), "a revoked run left an outcome");
        }
        ensure!(
            !run.has(run_folder::TARGET_DIGEST) && workshop.pushed(&spec.target_ref).await?.is_none(),
            "it pushed"
        );
    }
    Ok(())
}

/// The registry has the target's manifest and lets it wait; meanwhile the builder is told to stop. Whoever wants the push lock
/// has it only when that PUT is over, and what the builder says is what the registry has.
#[tokio::test(flavor = "multi_thread")]
async fn a_put_that_has_begun_is_seen_to_its_end() -> Result<()> {
    let workshop = Workshop::new().await?;
    let repository = workshop.repository(&[("Dockerfile", "FROM scratch\nCOPY Dockerfile /\n")], &[])?;
    for (cause, put_succeeds, exit) in [
        (run_folder::CANCEL, true, 0),
        (run_folder::REVOKED, true, 0),
        ("TERM", true, 0),
        ("deadline", true, 0),
        (run_folder::CANCEL, false, 1),
        (run_folder::REVOKED, false, 6),
        ("deadline", false, 1),
    ] {
        let (let_go, held) = watch::channel(false);
        let upstream = workshop.registry.address().to_owned();
        let front = Front::start(move |asked| match asked.is("PUT", "/workspace/manifests/") {
            true if put_succeeds => Reply::ForwardOnce(held.clone(), upstream.clone()),
            true => Reply::HangupOnce(held.clone()),
            false => Reply::Forward(upstream.clone()),
        })
        .await?;
        let mut spec = workshop.build(&repository, |_| {})?;
        let target = spec.target_ref.to_string();
        spec.target_ref = target.replace(workshop.registry.address(), &front.address).parse()?;
        if cause == "deadline" {
            spec.timeout_ms = 5_000;
        }
        let mut run = Run::prepare(&workshop, &spec, &RunSecrets::default())?;
        run.start()?;
        let puts = || front.count("PUT", "/workspace/manifests/");
        until("the PUT has begun", || Ok(puts() == 1)).await?;
        match cause {
            "TERM" => kill_process(builder(&run)?, Signal::TERM)?,
            "deadline" => {}
            name => run.touch(name)?,
        }
        until("it knows", || Ok(run.output().contains("told to stop while the target is PUT"))).await?;
        let lock = std::fs::File::open(run.folder.join(run_folder::PUSH_LOCK))?;
        let free = rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockShared);
        ensure!(free.is_err(), "{cause}: the push lock is free while the PUT is under way");
        let agents = front.asked().into_iter().filter(|asked| asked.is("PUT", "/workspace/manifests/"));
        let agents: Vec<_> = agents.filter_map(|asked| asked.headers.get("user-agent").cloned()).collect();
        let named = format!("kiln/{} (run {})", env!("CARGO_PKG_VERSION"), spec.run);
        ensure!(agents == [named], "{cause}: the registry sees {agents:?}");
        let_go.send_replace(true);
        let ended = run.wait()?;
        ensure!(ended == Some(exit), "{cause}, {put_succeeds}: {ended:?} {}", run.output());
        let there = workshop.pushed(&spec.target_ref).await?;
        ensure!(there.is_some() == put_succeeds && puts() == 1, "{cause}: {there:?}, {} PUTs", puts());
        match exit {
            0 => ensure!(Some(pushed(&run.outcome()?)?) == there, "{cause}: another digest"),
            1 => drop(failed(&run.outcome()?, if cause == "deadline" { Timeout } else { Internal })?),
            _ => ensure!(!run.has(run_folder::OUTCOME), "{cause}: it left an outcome"),
        }
    }
    Ok(())
}
