//! A cancel in each phase of a build. Whatever it meets, one of the two wins, and the state says what is in the registry.

use std::time::Duration;

use anyhow::{Result, ensure};
use kiln_contract::error::Code;
use kiln_domain::failure::{Failure, FailureReason};
use kiln_domain::id::{BuildId, ImageKey};
use kiln_domain::record::{Record, State};
use kiln_domain::reference::Digest;
use kiln_domain::run::{Ended, RunResult};
use kiln_orchestrator::Config;

use crate::stage::{Stage, config, ended, pushed};

/// What a builder leaves that was asked to stop.
fn stopped(recorded: Option<Digest>) -> Ended {
    let failure = Failure::new(FailureReason::Internal, "it was asked to stop");
    ended(RunResult::Failed(failure), recorded)
}

/// A build whose builder runs.
async fn running(stage: &Stage, image: &str) -> Result<Record> {
    let build = stage.begin(image, |_| {}).await?;
    Ok(stage.until(&build.id, |entry| entry.record.state == State::Running).await?.record)
}

async fn is_over(stage: &Stage, build: &Record) -> Result<Record> {
    Ok(stage.until(&build.id, |entry| entry.record.state.is_terminal()).await?.record)
}

#[tokio::test]
async fn one_that_is_queued_ends_at_once() -> Result<()> {
    let stage = Stage::set().await?;
    let _orchestrator = stage.orchestrator(Config { slots: 1, ..config() }).await?;
    running(&stage, "x").await?;
    let queued = stage.begin("y", |_| {}).await?;
    let answer = stage.cancel(&queued.id).await?.record()?;
    ensure!(answer.state == State::Cancelled && answer.message == "enough", "{answer:?}");
    ensure!(stage.events(&queued.id).await? == ["queued", "cancelled"]);
    Ok(())
}

#[tokio::test]
async fn one_that_is_starting_never_runs() -> Result<()> {
    let stage = Stage::set().await?;
    stage.engine.hold_starts();
    let _orchestrator = stage.orchestrator(config()).await?;
    let build = stage.begin("x", |_| {}).await?;
    while stage.engine.asked_to_start(&build.run()) == 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    stage.cancel(&build.id).await?;
    stage.until(&build.id, |entry| entry.record.cancel.is_some()).await?;
    stage.engine.make_starts();
    // The engine's call could not be taken back: the builder that it made is stopped.
    stage.engine.until_cancelled(&build.run()).await;
    stage.engine.end(&build.run(), stopped(None));
    ensure!(is_over(&stage, &build).await?.state == State::Cancelled);
    let events = stage.events(&build.id).await?;
    ensure!(events == ["queued", "claimed", "cancel_requested", "cancelled"], "{events:?}");
    Ok(())
}

/// The engine has said no and is asked again: a cancel is not kept waiting for it.
#[tokio::test]
async fn one_that_cannot_be_started_ends() -> Result<()> {
    let stage = Stage::set().await?;
    stage.engine.refuse_starts("no room");
    let _orchestrator = stage.orchestrator(config()).await?;
    let build = stage.begin("x", |_| {}).await?;
    while stage.engine.asked_to_start(&build.run()) == 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    stage.cancel(&build.id).await?;
    ensure!(is_over(&stage, &build).await?.state == State::Cancelled);
    Ok(())
}

#[tokio::test]
async fn one_that_runs_is_stopped() -> Result<()> {
    let stage = Stage::set().await?;
    let _orchestrator = stage.orchestrator(config()).await?;
    let build = running(&stage, "x").await?;
    stage.cancel(&build.id).await?;
    stage.engine.until_cancelled(&build.run()).await;
    let seen = stage.journal.last_of_build(&build.id).await?;
    ensure!(seen.is_some_and(|entry| !entry.record.state.is_terminal()), "nothing is said while it may push");
    stage.engine.end(&build.run(), stopped(None));
    ensure!(is_over(&stage, &build).await?.state == State::Cancelled);
    let again = stage.cancel(&build.id).await?.record()?;
    ensure!(again.state == State::Cancelled, "asked again, it is answered as it is");
    Ok(())
}

/// It waits for its second attempt, and nothing of the first is left.
#[tokio::test]
async fn one_that_waits_to_be_tried_again_ends() -> Result<()> {
    let stage = Stage::set().await?;
    let _orchestrator = stage.orchestrator(config()).await?;
    let build = running(&stage, "x").await?;
    stage.engine.end(&build.run(), Ended::default());
    stage.until(&build.id, |entry| entry.record.attempt == 2).await?;
    stage.cancel(&build.id).await?;
    let over = is_over(&stage, &build).await?;
    ensure!((over.state, over.attempt, over.handle.is_none()) == (State::Cancelled, 2, true), "{over:?}");
    ensure!(stage.engine.asked_to_start(&over.run()) == 0, "attempt 2 was started");
    Ok(())
}

/// It has recorded the digest that it is about to PUT: whether it did is the registry's word.
#[tokio::test]
async fn one_that_pushes_has_succeeded_if_the_image_is_there() -> Result<()> {
    let stage = Stage::set().await?;
    let _orchestrator = stage.orchestrator(config()).await?;
    for (image, put) in [("there", true), ("not", false)] {
        let build = running(&stage, image).await?;
        let digest = Digest::of(image.as_bytes());
        if put {
            stage.push(&build.target_ref, &digest);
        }
        stage.cancel(&build.id).await?;
        stage.engine.until_cancelled(&build.run()).await;
        stage.engine.end(&build.run(), stopped(Some(digest.clone())));
        let over = is_over(&stage, &build).await?;
        let expected = if put { (State::Succeeded, Some(digest)) } else { (State::Cancelled, None) };
        ensure!((over.state, over.digest) == expected, "{image}");
    }
    Ok(())
}

/// The builder is gone and its holder asks the registry: the cancel comes into the middle of that.
#[tokio::test]
async fn one_that_finishes_ends_as_its_builder_did() -> Result<()> {
    let stage = Stage::set().await?;
    let _orchestrator = stage.orchestrator(config()).await?;
    let digest = Digest::of(b"image");
    for (image, left, expected) in [
        ("there", pushed(&digest), (State::Succeeded, Some(digest.clone()))),
        ("not", stopped(Some(digest.clone())), (State::Cancelled, None)),
    ] {
        let build = running(&stage, image).await?;
        if expected.1.is_some() {
            stage.push(&build.target_ref, &digest);
        }
        stage.registry().shut();
        stage.engine.end(&build.run(), left);
        stage.registry().somebody_waits().await?;
        stage.cancel(&build.id).await?;
        stage.registry().open();
        let over = is_over(&stage, &build).await?;
        ensure!((over.state, over.digest) == expected, "{image}");
        let events = stage.events(&build.id).await?;
        ensure!(events.iter().filter(|event| *event == "cancel_requested").count() == 1, "{events:?}");
    }
    Ok(())
}

/// Builders that stop where they are asked in time, and else push: cancels at any moment.
#[tokio::test(flavor = "multi_thread")]
async fn in_a_race_with_the_push_image_and_state_agree() -> Result<()> {
    let stage = Stage::set().await?;
    let _orchestrators = [stage.orchestrator(config()).await?, stage.orchestrator(config()).await?];
    let race = |n: u64| {
        let stage = &stage;
        async move {
            let build = running(stage, &format!("x{n}")).await?;
            let digest = Digest::of(&n.to_be_bytes());
            let builder = async {
                tokio::time::sleep(Duration::from_millis(n * 2 % 17)).await;
                if stage.engine.is_cancelled(&build.run()) {
                    stage.engine.end(&build.run(), stopped(None));
                } else {
                    stage.succeed(&build, &digest);
                }
            };
            let cancel = async {
                tokio::time::sleep(Duration::from_millis(n * 5 % 11)).await;
                stage.cancel(&build.id).await
            };
            let (answer, ()) = tokio::join!(cancel, builder);
            answer?;
            let over = is_over(stage, &build).await?;
            let there = stage.image(&build.target_ref);
            ensure!(over.digest == there, "{n}: {over:?}, but at the target is {there:?}");
            let events = stage.events(&build.id).await?;
            let ends =
                events.iter().filter(|event| ["succeeded", "failed", "cancelled"].contains(&event.as_str()));
            ensure!(ends.count() == 1, "{n}: {events:?}");
            Ok(over.state)
        }
    };
    let states = futures::future::try_join_all((0..24).map(race)).await?;
    ensure!(states.iter().all(|state| matches!(state, State::Succeeded | State::Cancelled)), "{states:?}");
    Ok(())
}

#[tokio::test]
async fn one_that_nobody_knows_is_not_found() -> Result<()> {
    let stage = Stage::set().await?;
    let _orchestrator = stage.orchestrator(config()).await?;
    let unknown = BuildId::new(&ImageKey::of("nothing"), [0; 10]);
    ensure!(stage.cancel(&unknown).await.is_err_and(|refusal| refusal.code == Code::NotFound));
    Ok(())
}
