//! Callers as they should be: who is refused for a while asks again, of another gateway if there is one, and a stream
//! that breaks is resumed from where it was.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use kiln_proto::kiln_v1 as api;
use kiln_proto::kiln_v1::build_image_response::Outcome;
use kiln_proto::kiln_v1::build_logs_request::Start;
use kiln_proto::kiln_v1::builds_client::BuildsClient;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};
use tonic::transport::Channel;
use tonic::{Code, Response, Status};

use super::plan::{Cancel, Plan, Request};
use super::world::World;
use crate::system::is_over;

type Client = BuildsClient<Channel>;

/// How long one call may take before it is made again.
const CALL: Duration = Duration::from_secs(30);
const AGAIN: Duration = Duration::from_millis(200);

/// What came of a request.
pub(super) struct Seen {
    /// Its place in the plan.
    pub(super) request: usize,
    pub(super) answer: Answer,
}

pub(super) enum Answer {
    Build {
        joined: bool,
        /// As the watcher saw it last.
        last: Box<api::Build>,
        /// As each follower read it.
        logs: Vec<Vec<u8>>,
    },
    AlreadyBuilt(api::AlreadyBuilt),
}

/// What is known of a build while it goes on: its state, and the first follower's log.
#[derive(Default)]
struct Known {
    state: i32,
    log: Vec<u8>,
}

/// Makes the plan's requests, so many at a time, each followed to the end of all that came of it. After `until` none is begun.
pub(super) async fn call(
    world: &World,
    plan: &Plan,
    at_once: usize,
    until: Instant,
    begun: watch::Sender<usize>,
) -> Result<Vec<Seen>> {
    let clients = world.clients()?;
    let next = AtomicUsize::new(0);
    let caller = || async {
        let mut seen = Vec::new();
        while Instant::now() < until {
            let number = next.fetch_add(1, Ordering::Relaxed);
            let Some(request) = plan.builds.get(number) else { break };
            begun.send_modify(|begun| *begun += 1);
            let source = world.sources.request(request.image, plan.images[request.image])?;
            let answer = see_through(&clients, request, source).await;
            let answer = answer.with_context(|| format!("request {number}, {request:?}"))?;
            seen.push(Seen { request: number, answer });
        }
        anyhow::Ok(seen)
    };
    let seen = futures::future::try_join_all((0..at_once).map(|_| caller())).await?;
    Ok(seen.into_iter().flatten().collect())
}

async fn see_through(
    clients: &[Client],
    request: &Request,
    source: api::BuildImageRequest,
) -> Result<Answer> {
    let source = api::BuildImageRequest {
        owner: request.owner.clone(),
        force: request.force,
        timeout: Some(prost_types::Duration { seconds: 300, nanos: 0 }),
        ..source
    };
    let answer =
        insist(clients, request.gateway, async |mut client: Client| client.build_image(source.clone()).await);
    let answer = answer.await.context("BuildImage")?;
    let build = match answer.outcome.context("an answer without an outcome")? {
        Outcome::AlreadyBuilt(already) => return Ok(Answer::AlreadyBuilt(already)),
        Outcome::Build(build) => build,
    };
    let known = watch::Sender::new(Known::default());
    let others = watch::Sender::new(Known::default());
    let followers = (0..request.followers as usize).map(|number| {
        let known = if number == 0 { &known } else { &others };
        follow(clients, request.gateway + number, &build.id, known)
    });
    let (last, logs, ()) = tokio::try_join!(
        observe(clients, request.gateway, &build.id, &known),
        futures::future::try_join_all(followers),
        cancel(clients, request, &build.id, known.subscribe()),
    )
    .with_context(|| format!("build `{}`", build.id))?;
    Ok(Answer::Build { joined: answer.joined, last: Box::new(last), logs })
}

/// Asks until there is an answer.
pub(super) async fn insist<T>(
    clients: &[Client],
    first: usize,
    ask: impl AsyncFn(Client) -> Result<Response<T>, Status>,
) -> Result<T> {
    for number in first.. {
        match timeout(CALL, ask(clients[number % clients.len()].clone())).await {
            Ok(Ok(answer)) => return Ok(answer.into_inner()),
            Ok(Err(status)) => passing(status)?,
            Err(_) => {}
        }
        sleep(AGAIN).await;
    }
    bail!("no number is left")
}

/// A refusal that passes is to be answered by asking again; any other is the caller's, or a defect.
fn passing(status: Status) -> Result<()> {
    let passes = match status.code() {
        Code::Unavailable | Code::DeadlineExceeded => true,
        // A connection that broke, by tonic's word.
        Code::Unknown | Code::Cancelled | Code::Internal => {
            let text = format!("{status:?}");
            ["transport", "h2 protocol", "hyper", "broken", "connection", "Timeout expired"]
                .iter()
                .any(|word| text.contains(word))
        }
        _ => false,
    };
    ensure!(passes, "{status:?}");
    Ok(())
}

/// Watches a build to its end.
async fn observe(
    clients: &[Client],
    gateway: usize,
    id: &str,
    known: &watch::Sender<Known>,
) -> Result<api::Build> {
    for number in gateway.. {
        let watching = insist(clients, number, async |mut client: Client| {
            client.watch_build(api::WatchBuildRequest { id: id.to_owned() }).await
        });
        let mut builds = watching.await.context("WatchBuild")?;
        let mut last: Option<api::Build> = None;
        loop {
            match builds.message().await {
                Ok(Some(build)) => {
                    let before = last.as_ref().map_or(0, |last| last.revision);
                    ensure!(build.revision >= before, "revision {} follows {before}", build.revision);
                    known.send_modify(|known| known.state = build.state);
                    last = Some(build);
                }
                Ok(None) => match last {
                    Some(last) if is_over(&last) => return Ok(last),
                    last => bail!("the watch ended at {last:?}"),
                },
                Err(status) => {
                    passing(status).context("WatchBuild")?;
                    break;
                }
            }
        }
        sleep(AGAIN).await;
    }
    bail!("no number is left")
}

/// Reads a build's log to its completion.
async fn follow(
    clients: &[Client],
    gateway: usize,
    id: &str,
    known: &watch::Sender<Known>,
) -> Result<Vec<u8>> {
    let mut log = Vec::new();
    for number in gateway.. {
        let reading = insist(clients, number, async |mut client: Client| {
            let start = Some(Start::Offset(log.len() as u64));
            client.build_logs(api::BuildLogsRequest { id: id.to_owned(), follow: true, start }).await
        });
        let mut chunks = reading.await.context("BuildLogs")?;
        loop {
            match chunks.message().await {
                Ok(Some(chunk)) => {
                    let there = log.len() as u64;
                    ensure!(chunk.offset == there, "the log goes on at {}, not at {there}", chunk.offset);
                    log.extend_from_slice(&chunk.content);
                    known.send_modify(|known| known.log.clone_from(&log));
                    if chunk.complete {
                        return Ok(log);
                    }
                }
                Ok(None) => bail!("the log ended at {} without being complete", log.len()),
                Err(status) => {
                    passing(status).with_context(|| format!("BuildLogs at {}", log.len()))?;
                    break;
                }
            }
        }
        sleep(AGAIN).await;
    }
    bail!("no number is left")
}

/// Asks that the build stop when the plan says so, unless it is over before.
async fn cancel(
    clients: &[Client],
    request: &Request,
    id: &str,
    mut known: watch::Receiver<Known>,
) -> Result<()> {
    let Some(cancel) = request.cancel else { return Ok(()) };
    let over = |known: &Known| {
        let build = api::Build { state: known.state, ..Default::default() };
        known.state != 0 && is_over(&build)
    };
    let runs = |known: &Known| known.state == api::BuildState::Running as i32;
    let says = |known: &Known, text: &str| String::from_utf8_lossy(&known.log).contains(text);
    let due = known
        .wait_for(|known| {
            over(known)
                || match cancel {
                    Cancel::AtOnce => true,
                    Cancel::WhenRunning | Cancel::Into(_) => runs(known),
                    Cancel::AtPush => says(known, "kiln: pushing"),
                    Cancel::AtCopy => says(known, "kiln: copying"),
                }
        })
        .await;
    if over(&*due?) {
        return Ok(());
    }
    if let Cancel::Into(wait) = cancel {
        sleep(wait).await;
    }
    let asked = insist(clients, request.gateway + 1, async |mut client: Client| {
        client.cancel_build(api::CancelBuildRequest { id: id.to_owned(), reason: "chaos".into() }).await
    });
    asked.await.context("CancelBuild").map(drop)
}
