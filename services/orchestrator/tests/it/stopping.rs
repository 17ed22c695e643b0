//! Orchestrators that are asked to end while something keeps them waiting: they end all the same.

use std::time::Duration;

use anyhow::{Result, ensure};
use kiln_bus::Lease;
use kiln_contract::subject;
use kiln_domain::record::State;
use kiln_domain::reference::Digest;
use kiln_orchestrator::Config;
use kiln_testkit::streams;

use crate::stage::{Stage, config};

/// Well below what a supervisor gives a process until it kills it, and above all patience of a busy machine.
const PROMPTLY: Duration = Duration::from_secs(20);

#[tokio::test]
async fn who_can_append_nothing_ends() -> Result<()> {
    let stage = Stage::set().await?;
    let stop = stage.orchestrator(config()).await?;
    let build = stage.begin("x", |_| {}).await?;
    stage.until(&build.id, |entry| entry.record.state == State::Running).await?;
    stage.limit_journal(1).await?;
    let tried = streams::next_try(&stage.url(), &subject::event(&build.id, "succeeded")).await?;
    stage.succeed(&build, &Digest::of(b"image"));
    tokio::time::timeout(PROMPTLY, tried).await??;
    stop.cancel();
    stage.all_end(PROMPTLY).await?;
    // With more room another says how it ended.
    stage.limit_journal(256 << 20).await?;
    let _another = stage.orchestrator(config()).await?;
    stage.until(&build.id, |entry| entry.record.state == State::Succeeded).await?;
    Ok(())
}

#[tokio::test]
async fn who_waits_for_a_registry_ends_and_leaves_the_build_to_another() -> Result<()> {
    let stage = Stage::set().await?;
    let stop = stage.orchestrator(config()).await?;
    let build = stage.begin("x", |_| {}).await?;
    stage.until(&build.id, |entry| entry.record.state == State::Running).await?;
    stage.registry().shut();
    stage.succeed(&build, &Digest::of(b"image"));
    stage.registry().somebody_waits().await?;
    stop.cancel();
    stage.all_end(PROMPTLY).await?;
    let events = stage.events(&build.id).await?;
    ensure!(events == ["queued", "claimed", "started", "released"], "{events:?}");
    Ok(())
}

/// Several, each of which the bus keeps waiting.
#[tokio::test]
async fn who_is_about_to_act_on_many_builds_ends() -> Result<()> {
    let stage = Stage::set().await?;
    let wire = stage.wire().await?;
    let url = format!("nats://{}", wire.address());
    let config = Config { slots: 0, queue_limit_seconds: 2, ..config() };
    let stop = stage.orchestrator_at(&url, Lease::default(), stage.engine.clone(), config).await?;
    for image in ["a", "b", "c", "d", "e", "f"] {
        stage.begin(image, |_| {}).await?;
    }
    // The first whose time in the queue is up.
    let tried = streams::next_try(&stage.url(), subject::JOURNAL_SUBJECTS).await?;
    wire.lose_answers();
    tokio::time::timeout(PROMPTLY, tried).await??;
    stop.cancel();
    stage.all_end(PROMPTLY).await
}
