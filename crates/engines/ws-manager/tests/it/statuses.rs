//! What ws-manager says, late, twice, out of order or not at all.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use kiln_domain::engine::{Engine as _, EngineError, Observed};
use kiln_domain::failure::FailureReason;
use kiln_domain::run::{Ended, RunResult, RunSecrets};
use kiln_proto::wsman::{WorkspacePhase, WorkspaceStatus};
use kiln_testkit::engine_conformance::Job;

use crate::place::WsManagerPlace;

const SOON: Duration = Duration::from_secs(30);

#[tokio::test(flavor = "multi_thread")]
async fn a_start_is_asked_for_again_while_nobody_answers() -> Result<()> {
    let place = WsManagerPlace::new().await?;
    let (engine, spec) = (place.ws_engine(), place.spec(Job::Succeeds)?);
    place.ws_manager.refuse_starts(2);
    let handle = engine.start(&spec, &RunSecrets::default()).await?;
    ensure!(place.ws_manager.starts() == 3);
    tokio::time::timeout(SOON, engine.ended(&spec.run, &handle)).await??;
    // And if it goes on so, the caller decides.
    place.ws_manager.refuse_starts(100);
    let spec = place.spec(Job::Succeeds)?;
    let refused = engine.start(&spec, &RunSecrets::default()).await;
    ensure!(matches!(refused, Err(EngineError::Unavailable(_))), "{refused:?}");
    engine.close().await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_that_failed_is_the_users_in_the_words_of_the_workspace() -> Result<()> {
    let place = WsManagerPlace::new().await?;
    let (engine, spec) = (place.ws_engine(), place.spec(Job::Fails)?);
    let handle = engine.start(&spec, &RunSecrets::default()).await?;
    let ended = tokio::time::timeout(SOON, engine.ended(&spec.run, &handle)).await??;
    let Some(RunResult::Failed(failure)) = ended.outcome.map(|outcome| outcome.result) else {
        anyhow::bail!("no failure")
    };
    ensure!(failure.reason == FailureReason::Dockerfile, "{failure:?}");
    ensure!(failure.message == "headless task failed: exit status 1", "{failure:?}");
    Ok(())
}

/// The end comes while nobody is subscribed: found by the look at all workspaces that follows each connection.
#[tokio::test(flavor = "multi_thread")]
async fn a_workspace_that_vanished_meanwhile_has_ended() -> Result<()> {
    let place = WsManagerPlace::new().await?;
    let (engine, spec) = (place.ws_engine(), place.spec(Job::Endless)?);
    let handle = engine.start(&spec, &RunSecrets::default()).await?;
    ensure!(matches!(engine.observe(&spec.run).await?, Observed::Running(_)));
    let ended = engine.ended(&spec.run, &handle);
    tokio::pin!(ended);
    let early = tokio::time::timeout(Duration::from_millis(300), &mut ended).await;
    ensure!(early.is_err(), "it goes on: {early:?}");
    place.ws_manager.vanish(spec.run.as_str());
    place.ws_manager.cut();
    let ended = tokio::time::timeout(SOON, ended).await.context("it waits for ever")??;
    ensure!(ended == Ended::default(), "nobody knows how: {ended:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_late_status_takes_nothing_back_and_workspaces_of_others_are_left_alone() -> Result<()> {
    let place = WsManagerPlace::new().await?;
    // As the old service names them.
    let theirs = "9e3c1f5a-0000-4000-8000-0123456789ab";
    let mut status = WorkspaceStatus { id: theirs.into(), ..Default::default() };
    status.set_phase(WorkspacePhase::Running);
    status.metadata.get_or_insert_default().annotations.insert("managed-by".into(), "image-builder".into());
    place.ws_manager.add(status);
    let (engine, spec) = (place.ws_engine(), place.spec(Job::Succeeds)?);
    let handle = engine.start(&spec, &RunSecrets::default()).await?;
    let ended = tokio::time::timeout(SOON, engine.ended(&spec.run, &handle)).await??;
    let mut late = WorkspaceStatus { id: spec.run.to_string(), status_version: 1, ..Default::default() };
    late.set_phase(WorkspacePhase::Running);
    place.ws_manager.tell(late);
    ensure!(engine.observe(&spec.run).await? == Observed::Ended(ended));
    engine.remove(&spec.run).await?;
    ensure!(place.ws_manager.running().iter().any(|status| status.id == theirs), "it was stopped");
    engine.close().await;
    Ok(())
}
