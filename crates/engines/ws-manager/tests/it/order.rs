//! Statuses that come before, during or beside what they are waited for with.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use kiln_domain::engine::{Engine as _, Observed};
use kiln_domain::failure::FailureReason;
use kiln_domain::run::{Ended, RunResult, RunSecrets};
use kiln_proto::wsman::{WorkspacePhase, WorkspaceStatus};
use kiln_testkit::engine_conformance::Job;

use crate::place::WsManagerPlace;

const SOON: Duration = Duration::from_secs(30);

fn failure(ended: Ended) -> Result<FailureReason> {
    match ended.outcome.context("no outcome")?.result {
        RunResult::Failed(failure) => Ok(failure.reason),
        RunResult::Pushed(digest) => anyhow::bail!("it pushed {digest}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_workspace_that_fails_before_its_start_is_answered_has_ended() -> Result<()> {
    let place = WsManagerPlace::new().await?;
    let (engine, spec) = (place.ws_engine(), place.spec(Job::Fails)?);
    place.ws_manager.hold_answers(true);
    let secrets = RunSecrets::default();
    let over = async {
        place.ws_manager.until(spec.run.as_str(), WorkspacePhase::Stopped).await;
        place.ws_manager.hold_answers(false);
    };
    let (handle, ()) =
        tokio::time::timeout(SOON, async { tokio::join!(engine.start(&spec, &secrets), over) }).await?;
    let ended = tokio::time::timeout(SOON, engine.ended(&spec.run, &handle?)).await??;
    ensure!(failure(ended)? == FailureReason::Dockerfile);
    engine.close().await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn stopping_is_no_end_and_an_image_that_comes_until_stopped_counts() -> Result<()> {
    let place = WsManagerPlace::new().await?;
    let (engine, spec) = (place.ws_engine(), place.spec(Job::Endless)?);
    place.ws_manager.hold_stops(true);
    let handle = engine.start(&spec, &RunSecrets::default()).await?;
    place.ws_manager.until(spec.run.as_str(), WorkspacePhase::Running).await;
    place.ws_manager.finish(spec.run.as_str());
    place.ws_manager.until(spec.run.as_str(), WorkspacePhase::Stopping).await;
    ensure!(matches!(engine.observe(&spec.run).await?, Observed::Running(_)), "STOPPING is no end");
    let target = &spec.target_ref;
    let name = format!("{}:{}", target.repository(), target.tag().unwrap_or_default());
    let digest = place.registry().push_image(&name, "linux/amd64", &[("late", b"content")]).await?;
    place.ws_manager.hold_stops(false);
    let ended = tokio::time::timeout(SOON, engine.ended(&spec.run, &handle)).await??;
    ensure!(ended.recorded == Some(digest), "{ended:?}");
    engine.close().await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_end_waits_for_no_registry_that_another_run_waits_for() -> Result<()> {
    let place = WsManagerPlace::new().await?;
    let engine = place.ws_engine();
    let (pushes, fails) = (place.spec(Job::Endless)?, place.spec(Job::Fails)?);
    let handle = engine.start(&pushes, &RunSecrets::default()).await?;
    place.ws_manager.until(pushes.run.as_str(), WorkspacePhase::Running).await;
    place.registry().pause()?;
    place.ws_manager.finish(pushes.run.as_str());
    let asks = engine.ended(&pushes.run, &handle);
    tokio::pin!(asks);
    let failing = async {
        let handle = engine.start(&fails, &RunSecrets::default()).await?;
        engine.ended(&fails.run, &handle).await
    };
    tokio::select! {
        ended = failing => ensure!(failure(ended?)? == FailureReason::Dockerfile),
        ended = &mut asks => anyhow::bail!("the registry stands still: {ended:?}"),
    }
    place.registry().resume()?;
    engine.close().await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn statuses_with_parts_missing_end_nothing_and_hide_nothing() -> Result<()> {
    let place = WsManagerPlace::new().await?;
    let (engine, spec) = (place.ws_engine(), place.spec(Job::Endless)?);
    let handle = engine.start(&spec, &RunSecrets::default()).await?;
    place.ws_manager.until(spec.run.as_str(), WorkspacePhase::Running).await;
    for id in ["", spec.run.as_str(), "9e3c1f5a-0000-4000-8000-0123456789ab"] {
        place.ws_manager.tell(WorkspaceStatus { id: id.into(), ..Default::default() });
    }
    ensure!(matches!(engine.observe(&spec.run).await?, Observed::Running(_)));
    ensure!(engine.output_access(&spec.run).await?.is_some(), "its URL was forgotten");
    place.ws_manager.fail(spec.run.as_str(), "exit status 2");
    let ended = tokio::time::timeout(SOON, engine.ended(&spec.run, &handle)).await??;
    ensure!(failure(ended)? == FailureReason::Dockerfile);
    engine.close().await;
    Ok(())
}
