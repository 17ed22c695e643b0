//! Each way in which a build can end, and who sees it to its end.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use jiff::Timestamp;
use kiln_contract::error::{Code, Refusal};
use kiln_domain::engine::Engine as _;
use kiln_domain::failure::{Failure, FailureReason};
use kiln_domain::id::RunId;
use kiln_domain::record::State;
use kiln_domain::reference::Digest;
use kiln_domain::run::{Ended, Findings, Outcome, RunResult};
use kiln_domain::step::Step;
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

/// One that denies the installation, or is away for good, holds no build for ever.
#[tokio::test]
async fn a_registry_that_never_says_what_lies_at_the_target_ends_the_build_in_its_name() -> Result<()> {
    let stage = Stage::set().await?;
    let impatient = Config { registry_limit_seconds: 1, ..config() };
    let _orchestrator = stage.orchestrator(impatient).await?;
    for (image, code, left, reason) in [
        ("denied", Code::PermissionDenied, Some(Digest::of(b"image")), FailureReason::RegistryDenied),
        ("away", Code::Unavailable, Some(Digest::of(b"image")), FailureReason::RegistryUnavailable),
        ("lost", Code::Unavailable, None, FailureReason::RegistryUnavailable),
    ] {
        stage.registry().answer();
        let build = stage.begin(image, |_| {}).await?;
        stage.until(&build.id, |entry| entry.record.state == State::Running).await?;
        stage.registry().refuse(Refusal::new(code, "the registry says no"));
        stage.engine.end(&build.run(), left.as_ref().map(pushed).unwrap_or_default());
        let over = stage.until(&build.id, |entry| entry.record.state.is_terminal()).await?;
        ensure!(
            (over.record.state, over.record.reason) == (State::Failed, Some(reason)),
            "{:?}",
            over.record
        );
        let names = left.map(|digest| format!("the builder reported {digest}, but ")).unwrap_or_default();
        let says = format!(
            "{names}whether `{}` is there could not be learnt for 1 s: the registry says no",
            build.target_ref
        );
        ensure!(over.record.message == says, "{}", over.record.message);
    }
    Ok(())
}

#[tokio::test]
async fn a_users_error_waits_for_no_registry() -> Result<()> {
    let stage = Stage::set().await?;
    let _orchestrator = stage.orchestrator(config()).await?;
    let build = stage.begin("x", |_| {}).await?;
    stage.until(&build.id, |entry| entry.record.state == State::Running).await?;
    stage.registry().refuse(Refusal::new(Code::Unavailable, "the registry is away"));
    let wrong = Failure::new(FailureReason::Dockerfile, "step 2 failed");
    stage.engine.end(&build.run(), ended(RunResult::Failed(wrong.clone()), None));
    let over = stage.until(&build.id, |entry| entry.record.state.is_terminal()).await?;
    ensure!(over.record.reason == Some(wrong.reason), "{:?}", over.record);
    Ok(())
}

#[tokio::test]
async fn the_deadline_ends_a_build_whose_builder_does_not_and_names_what_took_so_long() -> Result<()> {
    let stage = Stage::set().await?;
    let _orchestrator = stage.orchestrator(config()).await?;
    let stopped = Failure::new(FailureReason::Internal, "it was asked to stop");
    let steps = [(1, "FROM scratch", 40), (2, "RUN make", 61_000), (3, "RUN make install", 900)];
    let step = |(number, name, milliseconds): (u32, &str, u64)| Step {
        number,
        of: 3,
        name: name.into(),
        started_at: Timestamp::UNIX_EPOCH,
        duration_ms: Some(milliseconds),
        cached: false,
    };
    let findings = Findings { steps: steps.map(step).into(), ..Findings::default() };
    let outcome = Outcome { result: RunResult::Failed(stopped), findings };
    for (image, left, says) in [
        ("lost", Ended::default(), "the build took longer than 0.0 s"),
        (
            "told",
            Ended { outcome: Some(outcome), recorded: None },
            "the build took longer than 0.0 s; what ran longest: step 2/3 `RUN make` (1 min 1 s)",
        ),
    ] {
        let build = stage.begin(image, |question| question.timeout_ms = 1).await?;
        stage.until(&build.id, |entry| entry.record.state == State::Running).await?;
        stage.engine.until_cancelled(&build.run()).await;
        stage.engine.end(&build.run(), left);
        let over = stage.until(&build.id, |entry| entry.record.state.is_terminal()).await?.record;
        ensure!((over.reason, over.message.as_str()) == (Some(FailureReason::Timeout), says), "{over:?}");
        ensure!(over.attempt == 1, "it is not tried again");
    }
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

#[tokio::test]
async fn who_waits_too_long_for_its_owners_other_builds_is_told_so() -> Result<()> {
    let stage = Stage::set().await?;
    let config = Config { max_running_per_owner: 1, queue_limit_seconds: 1, ..config() };
    let _orchestrator = stage.orchestrator(config).await?;
    let running = stage.begin("x", |_| {}).await?;
    stage.until(&running.id, |entry| entry.record.state == State::Running).await?;
    let waiting = stage.begin("y", |_| {}).await?;
    let over = stage.until(&waiting.id, |entry| entry.record.state.is_terminal()).await?.record;
    ensure!(over.reason == Some(FailureReason::QueueExpired), "{over:?}");
    ensure!(over.message.contains("its owner has 1 builds running, and may have 1"), "{}", over.message);
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
    stage.engine.until_cancelled(&run).await;
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

#[tokio::test]
async fn the_builder_of_a_build_that_the_journal_lost_is_ended() -> Result<()> {
    let stage = Stage::set().await?;
    let _orchestrator = stage.orchestrator(config()).await?;
    let build = stage.begin("x", |_| {}).await?;
    stage.until(&build.id, |entry| entry.record.state == State::Running).await?;
    stage.lose_journal().await?;
    let cancelled = async {
        while !stage.engine.is_cancelled(&build.run()) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), cancelled).await.context("it runs on for nobody")?;
    stage.engine.end(&build.run(), Ended::default());
    // The image can be built, by a build that has nothing to do with the lost one.
    let again = stage.begin("x", |_| {}).await?;
    ensure!(again.id != build.id);
    stage.until(&again.id, |entry| entry.record.state == State::Running).await?;
    stage.succeed(&again, &Digest::of(b"image"));
    stage.until(&again.id, |entry| entry.record.state == State::Succeeded).await?;
    Ok(())
}

#[tokio::test]
async fn a_full_journal_refuses_new_builds_by_its_name_and_lets_running_ones_end() -> Result<()> {
    let stage = Stage::set().await?;
    let _orchestrator = stage.orchestrator(config()).await?;
    let build = stage.begin("x", |_| {}).await?;
    stage.until(&build.id, |entry| entry.record.state == State::Running).await?;
    stage.limit_journal(8 << 20).await?;
    let refused = stage.ask("y", |_| {}).await.err().context("it was taken")?;
    ensure!(refused.code == Code::Unavailable, "{refused:?}");
    for part in ["KILN_BUILDS", "8388608", "streams.journal_max_bytes"] {
        ensure!(refused.message.contains(part), "{part} is missing in `{refused}`");
    }
    // Who asks for the image that is being built joins it all the same.
    ensure!(stage.ask("x", |_| {}).await?.joined);
    stage.succeed(&build, &Digest::of(b"image"));
    stage.until(&build.id, |entry| entry.record.state == State::Succeeded).await?;
    // With more room all is as before.
    stage.limit_journal(256 << 20).await?;
    stage.begin("y", |_| {}).await?;
    Ok(())
}
