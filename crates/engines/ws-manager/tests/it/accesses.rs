//! How clients read outputs by themselves.

use anyhow::{Context as _, Result, ensure};
use kiln_domain::engine::{Engine as _, EngineError};
use kiln_domain::run::RunSecrets;
use kiln_proto::wsman::{WorkspaceAuthentication, WorkspacePhase, WorkspaceSpec, WorkspaceStatus};
use kiln_testkit::engine_conformance::Job;
use secrecy::ExposeSecret as _;

use crate::place::WsManagerPlace;

#[tokio::test(flavor = "multi_thread")]
async fn a_run_is_read_with_its_owner_token_whoever_started_it() -> Result<()> {
    let place = WsManagerPlace::new().await?;
    let (engine, spec) = (place.ws_engine(), place.spec(Job::Endless)?);
    let before = engine.output_access(&spec.run).await;
    ensure!(matches!(before, Err(EngineError::Gone)), "{before:?}");
    engine.start(&spec, &RunSecrets::default()).await?;
    // Another process has to ask ws-manager; what it learns is the same.
    for engine in [engine, place.ws_engine()] {
        let access = engine.output_access(&spec.run).await?.context("an access")?;
        ensure!(access.url.ends_with(spec.run.as_str()), "{}", access.url);
        let token = access.headers.get("x-gitpod-owner-token").context("a token")?;
        ensure!(token.expose_secret() == format!("token-of-{}", spec.run));
        ensure!(!format!("{access:?}").contains("token-of"), "it shows: {access:?}");
        engine.close().await;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_workspace_without_its_url_or_token_is_asked_about_again() -> Result<()> {
    let place = WsManagerPlace::new().await?;
    let (engine, spec) = (place.ws_engine(), place.spec(Job::Endless)?);
    let mut status = WorkspaceStatus { id: spec.run.to_string(), ..Default::default() };
    status.metadata.get_or_insert_default().annotations.insert("managed-by".into(), "image-builder".into());
    place.ws_manager.add(status.clone());
    let early = engine.output_access(&spec.run).await;
    ensure!(matches!(early, Err(EngineError::Unavailable(_))), "{early:?}");
    status.spec = Some(WorkspaceSpec { url: "https://w.test".into(), ..Default::default() });
    status.auth = Some(WorkspaceAuthentication { owner_token: "word".into(), ..Default::default() });
    place.ws_manager.add(status);
    let access = engine.output_access(&spec.run).await?.context("an access")?;
    ensure!(access.url == "https://w.test");
    engine.close().await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_old_service_builds_is_seen_until_it_stops() -> Result<()> {
    let place = WsManagerPlace::new().await?;
    let (engine, spec) = (place.ws_engine(), place.spec(Job::Endless)?);
    engine.start(&spec, &RunSecrets::default()).await?;
    ensure!(engine.others().await?.is_empty(), "ours is none of theirs");
    let mut status =
        WorkspaceStatus { id: "9e3c1f5a-0000-4000-8000-0123456789ab".into(), ..Default::default() };
    status.set_phase(WorkspacePhase::Running);
    let metadata = status.metadata.get_or_insert_default();
    metadata.started_at = Some(prost_types::Timestamp { seconds: 1_700_000_000, nanos: 0 });
    for (name, value) in [("managed-by", "image-builder"), ("ref", "r.test/w:1"), ("baseref", "r.test/b:1")] {
        metadata.annotations.insert(name.into(), value.into());
    }
    // With no URL yet.
    place.ws_manager.add(status.clone());
    let others = engine.others().await?;
    let [other] = others.as_slice() else { anyhow::bail!("{others:?}") };
    ensure!(other.id == status.id && other.output.is_none(), "{other:?}");
    ensure!((other.target_ref.as_str(), other.base_ref.as_str()) == ("r.test/w:1", "r.test/b:1"));
    ensure!(other.started_at.map(|at| at.as_second()) == Some(1_700_000_000), "{other:?}");
    status.set_phase(WorkspacePhase::Stopped);
    place.ws_manager.add(status);
    ensure!(engine.others().await?.is_empty());
    engine.close().await;
    Ok(())
}
