//! Holders that die, are asked to end, or sleep and wake: another goes on with the same builder, and only one acts.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use kiln_bus::holders::Holders;
use kiln_domain::failure::{Failure, FailureReason};
use kiln_domain::id::{InstanceId, RunId};
use kiln_domain::record::{Record, State};
use kiln_domain::reference::Digest;
use kiln_domain::run::{Ended, RunResult};
use kiln_testkit::engine::FakeEngine;
use kiln_testkit::wire::Wire;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::stage::{Stage, config, ended};

/// A build that an orchestrator at the end of a wire runs, and another that would take it over.
struct Held {
    stage: Stage,
    wire: Wire,
    first: CancellationToken,
    first_engine: Arc<FakeEngine>,
    _second: (Wire, CancellationToken),
    build: Record,
    holder: InstanceId,
}

impl Held {
    async fn new() -> Result<Self> {
        let stage = Stage::set().await?;
        let (wire, other) = (stage.wire().await?, stage.wire().await?);
        let (first, first_engine) = stage.orchestrator_on(&wire).await?;
        let build = stage.begin("x", |_| {}).await?;
        let build = stage.until(&build.id, |entry| entry.record.state == State::Running).await?.record;
        let holder = build.claimed_by.clone().context("a holder")?;
        let (second, _) = stage.orchestrator_on(&other).await?;
        Ok(Self { stage, wire, first, first_engine, _second: (other, second), build, holder })
    }

    async fn is_taken_over(&self) -> Result<Record> {
        Ok(self.stage.until(&self.build.id, |entry| entry.record.claims == 2).await?.record)
    }

    /// Who claimed it, with each of its events.
    async fn history(&self) -> Result<Vec<(String, Option<InstanceId>)>> {
        let history = self.stage.history(&self.build.id).await?;
        let claimed_by = |(event, data): (String, kiln_bus::events::Event)| {
            let record: Record = serde_json::from_value(data.data)?;
            Ok((event, record.claimed_by))
        };
        history.into_iter().map(claimed_by).collect()
    }
}

/// Waits until those who live are as wanted.
async fn live(observer: &Holders, wanted: impl Fn(Vec<&InstanceId>) -> bool) -> Result<()> {
    let mut changes = observer.changes();
    let seen = changes.wait_for(|live| {
        wanted(live.iter().filter(|instance| instance.role() == kiln_orchestrator::ROLE).collect())
    });
    tokio::time::timeout(Duration::from_secs(30), seen).await.context("those who live")??;
    Ok(())
}

#[tokio::test]
async fn the_builder_of_a_dead_holder_is_adopted_as_it_is() -> Result<()> {
    let held = Held::new().await?;
    let Held { stage, wire, build, .. } = &held;
    wire.freeze();
    let adopted = held.is_taken_over().await?;
    ensure!((adopted.attempt, &adopted.handle) == (1, &build.handle), "{adopted:?}");
    ensure!(!stage.engine.is_cancelled(&build.run()) && stage.engine.asked_to_start(&build.run()) == 1);
    stage.succeed(build, &Digest::of(b"image"));
    let over = stage.until(&build.id, |entry| entry.record.state.is_terminal()).await?.record;
    ensure!((over.state, over.attempt) == (State::Succeeded, 1));
    let events = stage.events(&build.id).await?;
    ensure!(events == ["queued", "claimed", "started", "claimed", "succeeded"], "{events:?}");
    Ok(())
}

#[tokio::test]
async fn who_is_asked_to_end_lets_go_and_another_goes_on_at_once() -> Result<()> {
    let held = Held::new().await?;
    let Held { stage, build, .. } = &held;
    held.first.cancel();
    let adopted = held.is_taken_over().await?;
    ensure!((adopted.attempt, &adopted.handle) == (1, &build.handle), "{adopted:?}");
    ensure!(!stage.engine.is_cancelled(&build.run()) && stage.engine.asked_to_start(&build.run()) == 1);
    let history = stage.history(&build.id).await?;
    let names: Vec<_> = history.iter().map(|(event, _)| event.as_str()).collect();
    ensure!(names == ["queued", "claimed", "started", "released", "claimed"], "{names:?}");
    let times = (history.get(3).context("released")?.1.time, history.get(4).context("claimed")?.1.time);
    let without_holder = Duration::try_from(times.1.duration_since(times.0))?;
    ensure!(without_holder < Duration::from_secs(1), "it had no holder for {without_holder:?}");
    stage.succeed(build, &Digest::of(b"image"));
    stage.until(&build.id, |entry| entry.record.state == State::Succeeded).await?;
    Ok(())
}

/// It comes back after its lease has lapsed, its builder was lost, and another has started the next attempt. All that it
/// still believes would have it revoke, retry or end the build.
#[tokio::test]
async fn who_slept_past_its_lease_lets_go_when_it_wakes() -> Result<()> {
    let held = Held::new().await?;
    let Held { stage, wire, build, holder, .. } = &held;
    let observer = stage.observer().await?;
    live(&observer, |live| live.len() == 2).await?;
    wire.freeze();
    held.is_taken_over().await?;
    stage.engine.end(&build.run(), Ended::default());
    let second = RunId::new(&build.id, 2);
    stage.until(&build.id, |entry| entry.record.run() == second && entry.record.handle.is_some()).await?;
    // The builder's end reached the sleeper too.
    ensure!(held.first_engine.acts(&build.run()) == ["start"], "without a lease it acts");
    wire.restore();
    live(&observer, |live| live.len() == 2 && !live.contains(&holder)).await?;
    // It is back, under another name, and sees how things stand. What it does next, it does as anybody.
    let retried = stage.until(&build.id, |entry| entry.record.run() == second).await?.record;
    stage.succeed(&retried, &Digest::of(b"image"));
    let over = stage.until(&build.id, |entry| entry.record.state.is_terminal()).await?.record;
    ensure!((over.state, over.attempt, over.claims) == (State::Succeeded, 2, 2), "{over:?}");
    let acts = [build.run(), second].map(|run| held.first_engine.acts(&run));
    ensure!(acts == [&["start"][..], &[]], "it acted on what is another's: {acts:?}");
    let history = held.history().await?;
    let taken = history.iter().rposition(|(event, _)| event == "claimed").context("a claim")?;
    let after = history.get(taken..).unwrap_or_default();
    ensure!(after.iter().all(|(_, by)| by.as_ref() != Some(holder)), "{history:?}");
    let names: Vec<_> = history.iter().map(|(event, _)| event.as_str()).collect();
    ensure!(
        names == ["queued", "claimed", "started", "claimed", "retrying", "started", "succeeded"],
        "{names:?}"
    );
    // It has let go of it indeed: it ends at once, and takes part as anybody until then.
    let other = stage.begin("y", |_| {}).await?;
    stage.until(&other.id, |entry| entry.record.state == State::Running).await?;
    held.first.cancel();
    live(&observer, |live| live.len() == 1).await?;
    Ok(())
}

/// A started build whose deadline passes while nobody holds it.
async fn left_past_its_deadline() -> Result<(Stage, Record)> {
    let stage = Stage::set().await?;
    let first = stage.orchestrator(config()).await?;
    let build = stage.begin("x", |question| question.timeout_ms = 1).await?;
    stage.until(&build.id, |entry| entry.record.state == State::Running).await?;
    let started = Instant::now();
    first.cancel();
    stage.until(&build.id, |entry| entry.event == "released").await?;
    ensure!(!stage.engine.is_cancelled(&build.run()), "it was not left running");
    // A holder is a few seconds later than the builder itself would be.
    tokio::time::sleep_until(started + Duration::from_secs(6)).await;
    Ok((stage, build))
}

/// The deadline counts from the first holder's `started`: who comes after it has passed acts at once.
#[tokio::test]
async fn the_deadline_is_kept_by_whoever_holds_the_build() -> Result<()> {
    let (stage, build) = left_past_its_deadline().await?;
    let _second = stage.orchestrator(config()).await?;
    let claimed = stage.until(&build.id, |entry| entry.record.claims == 2).await?;
    stage.engine.until_cancelled(&build.run()).await;
    stage.engine.end(&build.run(), Ended::default());
    let over = stage.until(&build.id, |entry| entry.record.state.is_terminal()).await?;
    ensure!(over.record.reason == Some(FailureReason::Timeout), "{over:?}");
    // Concluding asks the registry twice, 2 s apart.
    let took = Duration::try_from(over.stored_at.duration_since(claimed.stored_at))?;
    ensure!(took < Duration::from_secs(5), "the deadline counted from the take-over: {took:?}");
    Ok(())
}

/// What ended before its deadline ended as it did, however late somebody looks.
#[tokio::test]
async fn a_failure_that_came_in_time_is_told_after_the_deadline() -> Result<()> {
    let (stage, build) = left_past_its_deadline().await?;
    let failure = Failure::new(FailureReason::Dockerfile, "step 1 failed");
    stage.engine.end(&build.run(), ended(RunResult::Failed(failure), None));
    let _second = stage.orchestrator(config()).await?;
    let over = stage.until(&build.id, |entry| entry.record.state.is_terminal()).await?.record;
    let told = (over.reason, over.message.as_str());
    ensure!(told == (Some(FailureReason::Dockerfile), "step 1 failed"), "{over:?}");
    ensure!(!stage.engine.is_cancelled(&build.run()), "what has ended was stopped");
    Ok(())
}

#[tokio::test]
async fn a_builder_lost_before_its_deadline_is_followed_by_another() -> Result<()> {
    let (stage, build) = left_past_its_deadline().await?;
    stage.engine.vanish(&build.run());
    let _second = stage.orchestrator(config()).await?;
    let second = RunId::new(&build.id, 2);
    stage.until(&build.id, |entry| entry.record.run() == second && entry.record.handle.is_some()).await?;
    let events = stage.events(&build.id).await?;
    ensure!(events.iter().any(|event| event == "retrying"), "{events:?}");
    Ok(())
}

/// Its holder asked the builder to stop, and died before it could say why.
#[tokio::test]
async fn a_builder_stopped_at_its_deadline_by_a_holder_that_died_is_a_timeout() -> Result<()> {
    let (stage, build) = left_past_its_deadline().await?;
    stage.engine.end(&build.run(), ended(RunResult::Failed(Failure::asked_to_stop()), None));
    let _second = stage.orchestrator(config()).await?;
    let over = stage.until(&build.id, |entry| entry.record.state.is_terminal()).await?.record;
    ensure!(over.reason == Some(FailureReason::Timeout), "{over:?}");
    Ok(())
}
