//! Builds whose builder can't be started, or is lost: how long they wait, and what is said of it.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use jiff::Timestamp;
use kiln_domain::failure::FailureReason;
use kiln_domain::id::RunId;
use kiln_domain::record::State;
use kiln_domain::reference::Digest;
use kiln_domain::run::Ended;
use kiln_orchestrator::Config;

use crate::stage::{Stage, config};

#[tokio::test]
async fn what_an_engine_refuses_is_let_go_of_and_started_once_it_can() -> Result<()> {
    let stage = Stage::set().await?;
    stage.engine.refuse_starts("the disk is full");
    let _orchestrator = stage.orchestrator(Config { slots: 1, ..config() }).await?;
    let build = stage.begin("x", |_| {}).await?;
    let released = stage.until(&build.id, |entry| entry.event == "released").await?.record;
    ensure!(released.claimed_by.is_none() && released.refused_starts == 1, "{released:?}");
    ensure!(released.message.contains("the disk is full"), "{released:?}");
    stage.engine.make_starts();
    // The only slot is free for another, though the first came before.
    let other = stage.begin("y", |_| {}).await?;
    stage.until(&other.id, |entry| entry.record.state == State::Running).await?;
    stage.succeed(&other, &Digest::of(b"other"));
    let started = stage.until(&build.id, |entry| entry.record.handle.is_some()).await?.record;
    ensure!((started.attempt, started.refused_starts, started.message.as_str()) == (1, 0, ""), "{started:?}");
    let events = stage.events(&build.id).await?;
    ensure!(events == ["queued", "claimed", "released", "claimed", "started"], "{events:?}");
    Ok(())
}

#[tokio::test]
async fn what_is_refused_until_its_time_is_up_says_why() -> Result<()> {
    let stage = Stage::set().await?;
    stage.engine.refuse_starts("the disk is full");
    // In the hands of its first holder, which has told nobody yet; and after that one let go of it.
    for (limit, events) in [
        (1, &["queued", "claimed", "failed"][..]),
        (3, &["queued", "claimed", "released", "claimed", "failed"]),
    ] {
        let orchestrator = stage.orchestrator(Config { queue_limit_seconds: limit, ..config() }).await?;
        let build = stage.begin(&format!("x{limit}"), |_| {}).await?;
        let over = stage.until(&build.id, |entry| entry.record.state.is_terminal()).await?.record;
        ensure!(over.reason == Some(FailureReason::QueueExpired), "{over:?}");
        ensure!(over.message.starts_with("it could not be started in time: "), "{over:?}");
        ensure!(over.message.contains("the disk is full"), "{over:?}");
        ensure!(stage.events(&build.id).await? == events);
        orchestrator.cancel();
    }
    Ok(())
}

#[tokio::test]
async fn a_builder_lost_three_times_is_engine_lost_and_each_attempt_waits_longer() -> Result<()> {
    let stage = Stage::set().await?;
    let _orchestrator = stage.orchestrator(config()).await?;
    let build = stage.begin("x", |_| {}).await?;
    for attempt in 1..=3 {
        stage
            .until(&build.id, |entry| entry.record.attempt == attempt && entry.record.handle.is_some())
            .await?;
        stage.engine.end(&RunId::new(&build.id, attempt), Ended::default());
    }
    let over = stage.until(&build.id, |entry| entry.record.state.is_terminal()).await?.record;
    ensure!((over.reason, over.attempt) == (Some(FailureReason::EngineLost), 3), "{over:?}");
    ensure!(over.claims == 1, "its holder keeps it while it waits");
    let history = stage.history(&build.id).await?;
    let names: Vec<_> = history.iter().map(|(event, _)| event.as_str()).collect();
    ensure!(
        names == ["queued", "claimed", "started", "retrying", "started", "retrying", "started", "failed"],
        "{names:?}"
    );
    let pause = |from: usize| -> Result<Duration> {
        let times =
            (history.get(from).context("retrying")?.1.time, history.get(from + 1).context("started")?.1.time);
        Ok(times.1.duration_since(times.0).try_into()?)
    };
    let (first, second) = (pause(3)?, pause(5)?);
    ensure!(first >= Duration::from_secs(1) && second >= Duration::from_secs(4), "{first:?}, {second:?}");
    Ok(())
}

/// However long the first wait and the first attempt were, the second wait has a limit of its own.
#[tokio::test]
async fn a_retried_build_that_finds_no_builder_ends_too() -> Result<()> {
    let stage = Stage::set().await?;
    let _orchestrator = stage.orchestrator(Config { queue_limit_seconds: 2, ..config() }).await?;
    let build = stage.begin("x", |_| {}).await?;
    let started = stage.until(&build.id, |entry| entry.record.handle.is_some()).await?.record;
    stage.engine.refuse_starts("the host is gone");
    let queue_time_is_up = started.start_deadline().context("a limit")?;
    while now() < queue_time_is_up {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    stage.engine.end(&build.run(), Ended::default());
    let over = stage.until(&build.id, |entry| entry.record.state.is_terminal()).await?.record;
    ensure!((over.reason, over.attempt) == (Some(FailureReason::QueueExpired), 2), "{over:?}");
    let waited = over.finished_at.context("an end")?.duration_since(over.retried_at.context("retried")?);
    ensure!(waited.as_secs() >= 2, "after {waited}");
    Ok(())
}

#[expect(clippy::disallowed_methods, reason = "a limit is compared with the stream's wall-clock time")]
fn now() -> Timestamp {
    Timestamp::now()
}
