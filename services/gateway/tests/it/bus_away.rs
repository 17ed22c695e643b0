//! NATS goes away and comes back, or loses what it held: what a client sees of that.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use kiln_bus::logs::Source;
use kiln_contract::subject;
use kiln_domain::transition::Change;
use kiln_proto::kiln_v1 as api;
use tokio::time::Instant;
use tonic::{Code, Status, Streaming};

use crate::desk::{Desk, SOON};

/// Every call once: how each ended and how long it took.
async fn every_call(desk: &Desk, id: &str) -> Vec<(&'static str, Result<(), Status>, Duration)> {
    let mut calls = Vec::new();
    let mut client = desk.client.clone();
    let id = || id.to_owned();
    let image = || Some(api::Source { from: Some(api::source::From::Image("registry.test/x:1".into())) });
    macro_rules! call {
        ($method:ident, $request:expr) => {
            let begun = Instant::now();
            let ended = client.$method($request).await.map(|_| ());
            calls.push((stringify!($method), ended, begun.elapsed()));
        };
    }
    call!(build_image, api::BuildImageRequest { source: image(), owner: "ann".into(), ..Default::default() });
    call!(build_status, api::BuildStatusRequest { id: id() });
    call!(watch_build, api::WatchBuildRequest { id: id() });
    call!(build_logs, api::BuildLogsRequest { id: id(), ..Default::default() });
    call!(list_builds, api::ListBuildsRequest::default());
    call!(cancel_build, api::CancelBuildRequest { id: id(), reason: String::new() });
    call!(
        resolve_base_image,
        api::ResolveBaseImageRequest { r#ref: "registry.test/x:1".into(), ..Default::default() }
    );
    call!(resolve_workspace_image, api::ResolveWorkspaceImageRequest { source: image(), auth: None });
    calls
}

async fn next<T>(stream: &mut Streaming<T>) -> Result<T, Status> {
    match tokio::time::timeout(SOON, stream.message()).await {
        Ok(Ok(Some(message))) => Ok(message),
        Ok(Ok(None)) => Err(Status::unknown("the stream ended")),
        Ok(Err(status)) => Err(status),
        Err(_) => Err(Status::unknown("nothing came")),
    }
}

async fn watch(desk: &Desk, id: &str) -> Result<Streaming<api::Build>> {
    let mut stream =
        desk.client.clone().watch_build(api::WatchBuildRequest { id: id.into() }).await?.into_inner();
    ensure!(next(&mut stream).await?.id == id);
    Ok(stream)
}

async fn follow(desk: &Desk, id: &str) -> Result<Streaming<api::LogChunk>> {
    let request = api::BuildLogsRequest { id: id.into(), follow: true, start: None };
    Ok(desk.client.clone().build_logs(request).await?.into_inner())
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_bus_each_call_is_unavailable_at_once_and_open_streams_go_on_after() -> Result<()> {
    let mut desk = Desk::set().await?;
    let queued = desk.queued(1).await?;
    let id = queued.record.id.to_string();
    let mut writer = desk.writer(&queued.record.id).await?;
    writer.append("before ".into(), Source::beginning(), false).await?;
    for (call, ended, _) in every_call(&desk, &id).await {
        ensure!(ended.is_ok(), "{call} before: {ended:?}");
    }
    let (mut builds, mut chunks) = (watch(&desk, &id).await?, follow(&desk, &id).await?);
    ensure!(next(&mut chunks).await?.content == b"before ");

    desk.server.kill();
    for (call, ended, took) in every_call(&desk, &id).await {
        let code = ended.as_ref().err().map(Status::code);
        ensure!(code == Some(Code::Unavailable), "{call}: {ended:?}");
        ensure!(took < Duration::from_secs(2), "{call} took {took:?}");
    }

    desk.server.start_again().await?;
    let claimed = desk.change(&queued, Change::Claimed { by: desk.by.clone() }).await?;
    let shown = next(&mut builds).await.context("the watch goes on")?;
    ensure!(shown.revision == claimed.sequence, "{shown:?}");
    writer.append("after".into(), Source::beginning(), false).await?;
    let chunk = next(&mut chunks).await.context("the log goes on")?;
    ensure!((chunk.offset, chunk.content.as_slice()) == (7, b"after"), "{chunk:?}");
    for (call, ended, _) in every_call(&desk, &id).await {
        ensure!(ended.is_ok(), "{call} after: {ended:?}");
    }
    Ok(())
}

/// Asks for a build until `ended` is so.
async fn build_until(desk: &Desk, ended: impl Fn(&Result<(), Status>, Duration) -> bool) -> Result<()> {
    let source = Some(api::Source { from: Some(api::source::From::Image("registry.test/x:1".into())) });
    let request = api::BuildImageRequest { source, owner: "ann".into(), ..Default::default() };
    let asking = async {
        loop {
            let begun = Instant::now();
            let answer = desk.client.clone().build_image(request.clone()).await.map(|_| ());
            if ended(&answer, begun.elapsed()) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(SOON * 2, asking).await.context("it never ended so")
}

#[tokio::test(flavor = "multi_thread")]
async fn once_the_bus_is_known_to_hang_no_call_waits_for_it() -> Result<()> {
    let desk = Desk::set().await?;
    let id = desk.queued(1).await?.record.id.to_string();
    desk.server.pause()?;
    let at_once = Duration::from_secs(1);
    build_until(&desk, |ended, took| ended.is_err() && took < at_once).await?;
    for (call, ended, took) in every_call(&desk, &id).await {
        let status = ended.err().with_context(|| format!("{call} was answered"))?;
        ensure!(
            status.code() == Code::Unavailable && status.message().contains("does not answer"),
            "{status:?}"
        );
        ensure!(took < at_once * 2, "{call} took {took:?}");
    }
    desk.server.resume()?;
    build_until(&desk, |ended, _| ended.is_ok()).await
}

#[tokio::test(flavor = "multi_thread")]
async fn while_the_bus_takes_nothing_changes_are_refused_at_once_and_the_rest_is_answered() -> Result<()> {
    let desk = Desk::set().await?;
    let id = desk.queued(1).await?.record.id.to_string();
    let holders = format!("KV_{}", kiln_contract::bucket::HOLDERS);
    desk.server.take_in_silence(&holders, true).await?;
    build_until(&desk, |ended, _| ended.is_err()).await?;
    for (call, ended, took) in every_call(&desk, &id).await {
        if ["build_image", "cancel_build"].contains(&call) {
            let status = ended.err().with_context(|| format!("{call} was answered"))?;
            ensure!(status.code() == Code::Unavailable, "{status:?}");
            ensure!(status.message().contains("takes no write"), "{status:?}");
            ensure!(took < Duration::from_secs(1), "{call} took {took:?}");
        } else {
            ensure!(ended.is_ok(), "{call}: {ended:?}");
        }
    }
    desk.server.take_in_silence(&holders, false).await?;
    build_until(&desk, |ended, _| ended.is_ok()).await
}

#[tokio::test(flavor = "multi_thread")]
async fn who_follows_a_build_that_the_journal_lost_is_told_so() -> Result<()> {
    let desk = Desk::set().await?;
    let queued = desk.queued(1).await?;
    let id = queued.record.id.to_string();
    let mut writer = desk.writer(&queued.record.id).await?;
    writer.append("some".into(), Source::beginning(), false).await?;
    let (mut builds, mut chunks) = (watch(&desk, &id).await?, follow(&desk, &id).await?);
    ensure!(next(&mut chunks).await?.content == b"some");
    desk.server.delete_stream(subject::JOURNAL_STREAM).await?;
    for ended in [next(&mut builds).await.map(|_| ()), next(&mut chunks).await.map(|_| ())] {
        let status = ended.err().context("it goes on")?;
        ensure!(status.code() == Code::DataLoss && status.message().contains(&id), "{status:?}");
    }
    let asked = desk.client.clone().build_status(api::BuildStatusRequest { id: id.clone() }).await;
    ensure!(asked.is_err_and(|status| status.code() == Code::NotFound));
    // What is there of its log can be read, and ends.
    let mut chunks = follow(&desk, &id).await?;
    ensure!(next(&mut chunks).await?.content == b"some");
    ensure!(tokio::time::timeout(SOON, chunks.message()).await??.is_none());
    Ok(())
}
