//! The streams of the old API, message by message.

use anyhow::{Context as _, Result, ensure};
use futures::StreamExt as _;
use kiln_domain::engine::Handle;
use kiln_domain::failure::{Failure, FailureReason};
use kiln_domain::transition::Change;
use kiln_proto::builder as mk3;
use kiln_proto::builder::build_source::From;
use tokio::time::timeout;
use tonic::Code;

use crate::desk::{Desk, OWNER_TOKEN, SOON};

fn request() -> mk3::BuildRequest {
    let reference = mk3::BuildSourceReference { r#ref: "r.test/x:1".into() };
    mk3::BuildRequest {
        source: Some(mk3::BuildSource { from: Some(From::Ref(reference)) }),
        ..Default::default()
    }
}

fn started(desk: &Desk) -> Change {
    Change::Started {
        by: desk.by.clone(),
        handle: Handle::new("a run"),
        engine: "fake".into(),
        build_tool: String::new(),
    }
}

fn failed(desk: &Desk) -> Change {
    let failure = Failure::new(FailureReason::Dockerfile, "headless task failed: exit 1");
    Change::Failed { by: Some(desk.by.clone()), failure, findings: Default::default() }
}

fn log_of(response: &mk3::BuildResponse) -> Option<&mk3::LogInfo> {
    response.info.as_ref()?.log_info.as_ref()
}

#[tokio::test]
async fn running_is_told_at_once_and_again_when_it_is_known_where_the_log_is() -> Result<()> {
    let desk = Desk::set().await?;
    let queued = desk.asked().await?;
    let mut client = desk.image_builder.clone();
    let mut stream = timeout(SOON, client.build(request())).await??.into_inner();
    let first = timeout(SOON, stream.message()).await??.context("a first message")?;
    ensure!(first.status() == mk3::BuildStatus::Running && log_of(&first).is_none(), "{first:?}");
    let claimed = desk.change(&queued, Change::Claimed { by: desk.by.clone() }).await?;
    let running = desk.change(&claimed, started(&desk)).await?;
    // The first answer is that it isn't known yet.
    let second = timeout(SOON, stream.message()).await??.context("a second message")?;
    ensure!(second.status() == mk3::BuildStatus::Running, "{second:?}");
    let log = log_of(&second).context("no log_info")?;
    ensure!(log.url == "https://w.test");
    ensure!(log.headers.get("x-gitpod-owner-token").is_some_and(|token| token == OWNER_TOKEN));
    // The list has it too, and what the old service builds.
    let listed = client.list_builds(mk3::ListBuildsRequest {}).await?.into_inner().builds;
    ensure!(listed.len() == 2 && listed.iter().all(|build| build.log_info.is_some()), "{listed:?}");
    ensure!(listed.iter().any(|build| build.build_id == "theirs"), "{listed:?}");
    desk.change(&running, failed(&desk)).await?;
    let rest: Vec<_> = timeout(SOON, stream.collect()).await?;
    let [Ok(done)] = rest.as_slice() else { anyhow::bail!("one message follows: {rest:?}") };
    ensure!(done.status() == mk3::BuildStatus::DoneFailure && log_of(done) == Some(log), "{done:?}");
    ensure!(done.message == "build failed: headless task failed: exit 1", "{done:?}");
    Ok(())
}

#[tokio::test]
async fn a_build_that_is_over_before_it_is_looked_at_is_told_with_its_log() -> Result<()> {
    let desk = Desk::set().await?;
    let queued = desk.asked().await?;
    let claimed = desk.change(&queued, Change::Claimed { by: desk.by.clone() }).await?;
    let running = desk.change(&claimed, started(&desk)).await?;
    desk.change(&running, failed(&desk)).await?;
    let mut client = desk.image_builder.clone();
    // The first answer is that it isn't known yet: the end doesn't wait for another.
    for has_log in [false, true] {
        let stream = timeout(SOON, client.build(request())).await??.into_inner();
        let all: Vec<_> = timeout(SOON, stream.collect()).await?;
        let [Ok(first), Ok(done)] = all.as_slice() else { anyhow::bail!("{all:?}") };
        ensure!(first.status() == mk3::BuildStatus::Running, "{first:?}");
        ensure!(done.status() == mk3::BuildStatus::DoneFailure, "{done:?}");
        ensure!(log_of(done).is_some() || !has_log, "{done:?}");
    }
    Ok(())
}

#[tokio::test]
async fn a_build_that_can_not_be_started_now_sends_its_client_to_come_again() -> Result<()> {
    let desk = Desk::set().await?;
    let queued = desk.asked().await?;
    let mut client = desk.image_builder.clone();
    let mut stream = timeout(SOON, client.build(request())).await??.into_inner();
    let first = timeout(SOON, stream.message()).await??.context("a first message")?;
    ensure!(first.status() == mk3::BuildStatus::Running, "{first:?}");
    let claimed = desk.change(&queued, Change::Claimed { by: desk.by.clone() }).await?;
    let why = Some("ws-manager: it is full".to_owned());
    desk.change(&claimed, Change::Released { by: desk.by.clone(), why }).await?;
    let status = timeout(SOON, stream.message()).await?.err().context("no error")?;
    ensure!(status.code() == Code::Unavailable, "{status:?}");
    ensure!(status.message() == "cannot start build: ws-manager: it is full", "{status:?}");
    // It is still there.
    let listed = client.list_builds(mk3::ListBuildsRequest {}).await?.into_inner().builds;
    ensure!(listed.iter().any(|build| build.build_id == queued.record.id.to_string()), "{listed:?}");
    Ok(())
}
