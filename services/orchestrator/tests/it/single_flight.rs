//! One image, one build, whoever asks and wherever.

use std::collections::HashSet;

use anyhow::{Context as _, Result, ensure};
use kiln_contract::error::Code;
use kiln_domain::record::State;
use kiln_domain::reference::Digest;

use crate::stage::{Stage, config};

#[tokio::test(flavor = "multi_thread")]
async fn ten_at_once_at_two_orchestrators_are_one_build() -> Result<()> {
    let stage = Stage::set().await?;
    let _first = stage.orchestrator(config()).await?;
    let _second = stage.orchestrator(config()).await?;
    let asked = (0..10).map(|n| stage.ask("x", move |question| question.owner = format!("owner-{n}")));
    let answers = futures::future::try_join_all(asked).await?;
    let ids: HashSet<_> = answers
        .iter()
        .map(|answer| Ok(answer.build.as_ref().context("a build")?.record()?.id))
        .collect::<Result<_>>()?;
    ensure!(ids.len() == 1, "{ids:?}");
    ensure!(answers.iter().filter(|answer| !answer.joined).count() == 1);
    let id = ids.into_iter().next().context("an id")?;
    let all = stage.until(&id, |entry| entry.record.owners().count() == 10).await?;
    let started = stage.until(&id, |entry| entry.record.state == State::Running).await?;
    ensure!(started.record.claims == 1 && all.record.attempt == 1);
    let digest = Digest::of(b"image");
    stage.succeed(&started.record, &digest);
    let over = stage.until(&id, |entry| entry.record.state.is_terminal()).await?;
    ensure!(over.record.state == State::Succeeded && over.record.digest == Some(digest));
    Ok(())
}

#[tokio::test]
async fn an_image_that_is_there_is_said_to_be_unless_forced() -> Result<()> {
    let stage = Stage::set().await?;
    let _orchestrator = stage.orchestrator(config()).await?;
    let built = stage.begin("x", |_| {}).await?;
    let digest = Digest::of(b"image");
    stage.until(&built.id, |entry| entry.record.state == State::Running).await?;
    stage.succeed(&built, &digest);
    stage.until(&built.id, |entry| entry.record.state == State::Succeeded).await?;
    let again = stage.ask("x", |_| {}).await?.already_built.context("it is there")?;
    ensure!(again.target_ref == built.target_ref && again.digest == digest.to_string());
    let forced = stage.begin("x", |question| question.force = true).await?;
    ensure!(forced.id != built.id && forced.digest_before == Some(digest));
    ensure!(stage.ask("x", |question| question.force = true).await?.joined, "a forced one joins too");
    ensure!(
        stage.ask("x", |_| {}).await?.already_built.is_some(),
        "an unforced one has its image, whatever is built"
    );
    Ok(())
}

#[tokio::test]
async fn a_request_that_is_met_again_gets_its_build_and_has_not_joined() -> Result<()> {
    let stage = Stage::set().await?;
    let _orchestrator = stage.orchestrator(config()).await?;
    let ask = |question: &mut kiln_contract::orchestrator::Build| question.request_id = "the same".into();
    let first = stage.begin("x", ask).await?;
    let answer = stage.ask("x", ask).await?;
    ensure!(!answer.joined && answer.build.context("a build")?.record()?.id == first.id);
    stage.cancel(&first.id).await?;
    stage.until(&first.id, |entry| entry.record.cancel.is_some()).await?;
    Ok(())
}

#[tokio::test]
async fn a_full_queue_refuses_with_its_length() -> Result<()> {
    let stage = Stage::set().await?;
    let config = kiln_orchestrator::Config { slots: 1, max_queued: 2, ..config() };
    let _orchestrator = stage.orchestrator(config).await?;
    let running = stage.begin("x0", |_| {}).await?;
    stage.until(&running.id, |entry| entry.record.state == State::Running).await?;
    for n in 1..=2 {
        stage.begin(&format!("x{n}"), |_| {}).await?;
    }
    // The bound is kept by the view, which is a moment behind.
    let mut refused = None;
    for n in 3..20 {
        if let Err(refusal) = stage.ask(&format!("x{n}"), |_| {}).await {
            refused = Some(refusal);
            break;
        }
    }
    let refused = refused.context("nothing was refused")?;
    ensure!(
        refused.code == Code::ResourceExhausted && refused.message.contains("builds wait"),
        "{refused:?}"
    );
    Ok(())
}

#[tokio::test]
async fn a_timeout_above_the_limit_is_refused_by_name() -> Result<()> {
    let stage = Stage::set().await?;
    let config =
        kiln_orchestrator::Config { max_timeout_seconds: 60, default_timeout_seconds: 60, ..config() };
    let _orchestrator = stage.orchestrator(config).await?;
    let refused = stage.ask("x", |question| question.timeout_ms = 60_001).await.unwrap_err();
    ensure!(refused.code == Code::InvalidArgument && refused.message.starts_with("timeout: "), "{refused:?}");
    Ok(())
}
