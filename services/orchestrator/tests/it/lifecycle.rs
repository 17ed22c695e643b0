//! Each way in which a build can end, and who sees it to its end.

use anyhow::{Result, ensure};
use kiln_contract::error::Code;
use kiln_domain::engine::Engine as _;
use kiln_domain::failure::{Failure, FailureReason};
use kiln_domain::id::{BuildId, ImageKey, RunId};
use kiln_domain::record::State;
use kiln_domain::reference::Digest;
use kiln_domain::run::{Ended, RunResult};
use kiln_orchestrator::Config;

use crate::stage::{Stage, config, ended, pushed};

#[tokio::test]
async fn success_without_the_image_is_image_missing() -> Result<()> {
    let stage = Stage::set().await?;
    let _orchestrator = stage.orchestrator(config()).await?;
    let build = stage.begin("x", |_| {}).await?;
    stage.until(&build.id, |entry| entry.record.state == State::Running).await?;
    stage.engine.end(&build.run(), pushed(&Digest::of(b"nowhere")));
    let over = stage.until(&build.id, |entry| entry.record.state.is_terminal()).await?;
    ensure!(over.record.reason == Some(FailureReason::ImageMissing), "{over:?}");
    Ok(())
}

#[tokio::test]
async fn a_users_error_is_never_tried_again() -> Result<()> {
    let stage = Stage::set().await?;
    let _orchestrator = stage.orchestrator(config()).await?;
    let build = stage.begin("x", |_| {}).await?;
    stage.until(&build.id, |entry| entry.record.state == State::Running).await?;
    let failure = Failure::new(FailureReason::Dockerfile, "step 2/3 failed with exit code 9");
    stage.engine.end(&build.run(), ended(RunResult::Failed(failure.clone()), None));
    let over = stage.until(&build.id, |entry| entry.record.state.is_terminal()).await?.record;
    ensure!((over.state, over.reason, over.attempt) == (State::Failed, Some(failure.reason), 1));
    ensure!(over.message == failure.message);
    Ok(())
}

#[tokio::test]
async fn a_lost_builder_is_revoked_and_another_started() -> Result<()> {
    let stage = Stage::set().await?;
    let _orchestrator = stage.orchestrator(config()).await?;
    let build = stage.begin("x", |_| {}).await?;
    stage.until(&build.id, |entry| entry.record.state == State::Running).await?;
    stage.engine.end(&build.run(), Ended::default());
    let retried =
        stage.until(&build.id, |entry| entry.record.attempt == 2 && entry.record.handle.is_some()).await?;
    ensure!(
        retried.record.started_at < retried.record.attempt_started_at,
        "the deadline counts from the new start"
    );
    let spec = kiln_domain::run::RunSpec {
        run: build.run(),
        work: kiln_domain::run::Work::Copy { from: "r/x:1".parse()?, platform: Default::default() },
        target_ref: "r/y:1".parse()?,
        owner: String::new(),
        timeout_ms: 1,
        no_cache: false,
        plain_http: vec![],
        file_remotes: false,
        traceparent: String::new(),
    };
    let late = stage.engine.start(&spec, &Default::default()).await;
    ensure!(
        matches!(late, Err(kiln_domain::engine::EngineError::Revoked)),
        "a late start of attempt 1: {late:?}"
    );
    stage.succeed(&retried.record, &Digest::of(b"image"));
    let over = stage.until(&build.id, |entry| entry.record.state.is_terminal()).await?;
    ensure!((over.record.state, over.record.attempt) == (State::Succeeded, 2));
    Ok(())
}

#[tokio::test]
async fn a_builder_lost_after_its_put_has_succeeded() -> Result<()> {
    let stage = Stage::set().await?;
    let _orchestrator = stage.orchestrator(config()).await?;
    let build = stage.begin("x", |_| {}).await?;
    stage.until(&build.id, |entry| entry.record.state == State::Running).await?;
    let digest = Digest::of(b"image");
    stage.push(&build.target_ref, &digest);
    stage.engine.end(&build.run(), Ended { outcome: None, recorded: Some(digest.clone()) });
    let over = stage.until(&build.id, |entry| entry.record.state.is_terminal()).await?;
    ensure!((over.record.state, over.record.digest) == (State::Succeeded, Some(digest)));
    Ok(())
}

#[tokio::test]
async fn cancels_of_a_queued_a_running_and_a_finished_build() -> Result<()> {
    let stage = Stage::set().await?;
    let _orchestrator = stage.orchestrator(Config { slots: 1, ..config() }).await?;
    let running = stage.begin("x", |_| {}).await?;
    stage.until(&running.id, |entry| entry.record.state == State::Running).await?;
    let queued = stage.begin("y", |_| {}).await?;
    let answer = stage.cancel(&queued.id).await?.record()?;
    ensure!(answer.state == State::Cancelled && answer.message == "enough", "at once: {answer:?}");

    stage.cancel(&running.id).await?;
    stage.until(&running.id, |entry| entry.record.cancel.is_some()).await?;
    while !stage.engine.is_cancelled(&running.run()) {
        tokio::task::yield_now().await;
    }
    let stopped = Failure::new(FailureReason::Internal, "it was asked to stop");
    stage.engine.end(&running.run(), ended(RunResult::Failed(stopped), None));
    stage.until(&running.id, |entry| entry.record.state == State::Cancelled).await?;
    ensure!(stage.cancel(&running.id).await?.record()?.state == State::Cancelled, "it is idempotent");

    let unknown = BuildId::new(&ImageKey::of("nothing"), [0; 10]);
    ensure!(stage.cancel(&unknown).await.unwrap_err().code == Code::NotFound);
    Ok(())
}

#[tokio::test]
async fn a_cancel_that_comes_after_the_push_is_a_success() -> Result<()> {
    let stage = Stage::set().await?;
    let _orchestrator = stage.orchestrator(config()).await?;
    let build = stage.begin("x", |_| {}).await?;
    stage.until(&build.id, |entry| entry.record.state == State::Running).await?;
    let digest = Digest::of(b"image");
    stage.push(&build.target_ref, &digest);
    stage.cancel(&build.id).await?;
    let stopped = Failure::new(FailureReason::Internal, "it was asked to stop");
    stage.engine.end(&build.run(), ended(RunResult::Failed(stopped), Some(digest.clone())));
    let over = stage.until(&build.id, |entry| entry.record.state.is_terminal()).await?;
    ensure!(
        (over.record.state, over.record.digest) == (State::Succeeded, Some(digest)),
        "image and state agree"
    );
    Ok(())
}

#[tokio::test]
async fn who_is_asked_to_end_lets_go_and_another_adopts_the_same_builder() -> Result<()> {
    let stage = Stage::set().await?;
    let first = stage.orchestrator(config()).await?;
    let build = stage.begin("x", |_| {}).await?;
    stage.until(&build.id, |entry| entry.record.state == State::Running).await?;
    let _second = stage.orchestrator(config()).await?;
    first.cancel();
    let adopted = stage.until(&build.id, |entry| entry.record.claims == 2).await?;
    ensure!(adopted.record.attempt == 1 && !stage.engine.is_cancelled(&build.run()));
    stage.succeed(&build, &Digest::of(b"image"));
    let over = stage.until(&build.id, |entry| entry.record.state.is_terminal()).await?;
    ensure!((over.record.state, over.record.attempt) == (State::Succeeded, 1));
    Ok(())
}

#[tokio::test]
async fn a_builder_that_was_started_but_not_said_to_be_is_found() -> Result<()> {
    let stage = Stage::set().await?;
    // A former holder claimed the build and started it; then it died.
    let record = kiln_testkit::records::queued("x", [1; 10])?;
    let by = kiln_domain::id::InstanceId::new("orchestrator", 1)?;
    let queued = kiln_domain::transition::Change::Queued(Box::new(record.clone()));
    let queued = stage.journal.append(None, &queued, &by).await?;
    let claimed = kiln_domain::transition::Change::Claimed { by: by.clone() };
    stage.journal.append(Some(&queued), &claimed, &by).await?;
    stage.engine.begin(&RunId::new(&record.id, 1));
    let _orchestrator = stage.orchestrator(config()).await?;
    let found = stage.until(&record.id, |entry| entry.record.handle.is_some()).await?;
    ensure!((found.record.claims, found.record.attempt) == (2, 1));
    Ok(())
}

#[tokio::test]
async fn the_deadline_ends_a_build_whose_builder_does_not() -> Result<()> {
    let stage = Stage::set().await?;
    let _orchestrator = stage.orchestrator(config()).await?;
    let build = stage.begin("x", |question| question.timeout_ms = 1).await?;
    stage.until(&build.id, |entry| entry.record.state == State::Running).await?;
    while !stage.engine.is_cancelled(&build.run()) {
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    stage.engine.end(&build.run(), Ended::default());
    let over = stage.until(&build.id, |entry| entry.record.state.is_terminal()).await?;
    ensure!(over.record.reason == Some(FailureReason::Timeout), "{over:?}");
    Ok(())
}

#[tokio::test]
async fn who_waits_too_long_is_told_though_no_slot_is_free() -> Result<()> {
    let stage = Stage::set().await?;
    let _orchestrator = stage.orchestrator(Config { slots: 1, queue_limit_seconds: 1, ..config() }).await?;
    let running = stage.begin("x", |_| {}).await?;
    stage.until(&running.id, |entry| entry.record.state == State::Running).await?;
    let waiting = stage.begin("y", |_| {}).await?;
    let over = stage.until(&waiting.id, |entry| entry.record.state.is_terminal()).await?.record;
    ensure!((over.reason, over.claims) == (Some(FailureReason::QueueExpired), 0), "{over:?}");
    let still = stage.journal.last_of_build(&running.id).await?;
    ensure!(still.is_some_and(|entry| entry.record.state == State::Running));
    Ok(())
}

/// A holder that gives a build up judges it as any other end: an earlier one may have started it.
#[tokio::test]
async fn a_build_given_up_was_started_by_an_earlier_holder_all_the_same() -> Result<()> {
    let stage = Stage::set().await?;
    let mut record = kiln_testkit::records::queued("x", [2; 10])?;
    record.queue_limit_ms = 1;
    let by = kiln_domain::id::InstanceId::new("orchestrator", 1)?;
    let queued = kiln_domain::transition::Change::Queued(Box::new(record.clone()));
    let queued = stage.journal.append(None, &queued, &by).await?;
    let claimed = kiln_domain::transition::Change::Claimed { by: by.clone() };
    stage.journal.append(Some(&queued), &claimed, &by).await?;
    let run = RunId::new(&record.id, 1);
    stage.engine.begin(&run);
    let _orchestrator = stage.orchestrator(config()).await?;
    // It is stopped before anything is said of it, and what it had pushed by then counts.
    while !stage.engine.is_cancelled(&run) {
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    let running = stage.journal.last_of_build(&record.id).await?;
    ensure!(
        running.is_some_and(|entry| !entry.record.state.is_terminal()),
        "nothing is said while it may push"
    );
    let digest = Digest::of(b"image");
    stage.succeed(&record, &digest);
    let over = stage.until(&record.id, |entry| entry.record.state.is_terminal()).await?.record;
    ensure!((over.state, over.digest) == (State::Succeeded, Some(digest)));
    Ok(())
}
