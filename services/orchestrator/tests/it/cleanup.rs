//! What is left of builds that are over, and who still finds it.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use kiln_bus::secrets::SecretsBucket;
use kiln_domain::failure::FailureReason;
use kiln_domain::record::{Record, State};
use kiln_domain::reference::Digest;
use kiln_orchestrator::Config;

use crate::stage::{Stage, config};

const SOON: Duration = Duration::from_secs(30);

/// Waits until a build is on the list of what is to be cleaned up, or isn't any more.
async fn listed(secrets: &SecretsBucket, build: &Record, wanted: bool) -> Result<()> {
    let look = async {
        while secrets.lists(&build.id).await? != wanted {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(())
    };
    tokio::time::timeout(SOON, look).await.with_context(|| format!("listed is never {wanted}"))?
}

#[tokio::test]
async fn a_build_whose_secrets_are_lost_is_cleaned_up_all_the_same() -> Result<()> {
    let stage = Stage::set().await?;
    let _orchestrator = stage.orchestrator(config()).await?;
    let secrets = SecretsBucket::open(&stage.bus).await?;
    let build = stage.begin("x", |_| {}).await?;
    stage.until(&build.id, |entry| entry.record.state == State::Running).await?;
    secrets.remove(&build.id).await?;
    listed(&secrets, &build, true).await?;
    ensure!(secrets.get(&build.id).await?.is_none(), "what is lost looks like secrets");
    stage.succeed(&build, &Digest::of(b"image"));
    stage.complete_log(&build).await?;
    listed(&secrets, &build, false).await?;
    ensure!(!stage.engine.is_there(&build.run()), "its run is left");
    Ok(())
}

#[tokio::test]
async fn a_build_that_lost_its_secrets_before_it_started_fails_and_runs_never() -> Result<()> {
    let stage = Stage::set().await?;
    let _without_slots = stage.orchestrator(Config { slots: 0, ..config() }).await?;
    let secrets = SecretsBucket::open(&stage.bus).await?;
    let build = stage.begin("x", |_| {}).await?;
    secrets.remove(&build.id).await?;
    listed(&secrets, &build, true).await?;
    let _orchestrator = stage.orchestrator(config()).await?;
    let over = stage.until(&build.id, |entry| entry.record.state.is_terminal()).await?.record;
    let told = (over.reason, over.message.as_str());
    ensure!(told == (Some(FailureReason::Internal), "the build's secrets are gone"), "{over:?}");
    Ok(())
}

#[tokio::test]
async fn a_run_that_can_not_be_removed_keeps_no_other_from_it() -> Result<()> {
    let stage = Stage::set().await?;
    let _orchestrator = stage.orchestrator(config()).await?;
    let secrets = SecretsBucket::open(&stage.bus).await?;
    let mut builds = Vec::new();
    for image in ["a", "b", "c"] {
        let build = stage.begin(image, |_| {}).await?;
        stage.until(&build.id, |entry| entry.record.state == State::Running).await?;
        builds.push(build);
    }
    let [held, others @ ..] = &builds[..] else { unreachable!() };
    stage.engine.hold_removal(&held.run());
    stage.succeed(held, &Digest::of(b"image"));
    stage.complete_log(held).await?;
    let removing = async {
        while !stage.engine.acts(&held.run()).contains(&"remove") {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(SOON, removing).await.context("it is not cleaned up")?;
    for build in others {
        stage.succeed(build, &Digest::of(b"image"));
        stage.complete_log(build).await?;
    }
    for build in others {
        listed(&secrets, build, false).await?;
    }
    ensure!(secrets.lists(&held.id).await? && stage.engine.is_there(&held.run()));
    stage.engine.make_removals();
    listed(&secrets, held, false).await
}
