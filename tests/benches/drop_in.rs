//! The old API over a ws-manager and supervisors, both fakes after their protocol. Prints, and asserts only that all went well.
//!
//! - from Build to StartWorkspace, one at a time and 16 at once, beside what it can't do without: two appends to a stream of
//!   the bus and two HEADs to the registry. Of a base image that the resolver knows, as Gitpod's server has asked for it
//!   before, and of one that nobody asked for yet, whose manifest and config are read then;
//! - from STOPPED, which comes right after STOPPING, to the client's `done`;
//! - one log of 8 MB from a supervisor, with 1,000 followers by Logs.

#![expect(
    clippy::print_stdout,
    clippy::disallowed_methods,
    reason = "a benchmark measures time, prints figures, and may end where a test may"
)]

mod figures;

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use async_trait::async_trait;
use bytes::Bytes;
use futures::future::try_join_all;
use kiln_bus::seal::OpenKey;
use kiln_contract::subject;
use kiln_domain::reference::ImageReference;
use kiln_proto::builder as mk3;
use kiln_proto::builder::image_builder_client::ImageBuilderClient;
use kiln_registry::{Access, OciRegistry, Registry as _};
use kiln_testkit::bare;
use kiln_testkit::fleet::Fleet;
use kiln_testkit::installation::program;
use kiln_testkit::registry::DockerRegistry;
use kiln_testkit::ws_manager::{Work, Workspace, WsManager};
use secrecy::ExposeSecret as _;
use tokio::sync::{Barrier, watch};
use tokio::time::Instant;
use tonic::Streaming;
use tonic::transport::Channel;

use crate::figures::figures;

const ROLES: [&str; 4] = ["gateway", "resolver", "orchestrator", "log-relay"];
const ALONE: usize = 40;
const ROUNDS: usize = 10;
const AT_ONCE: usize = 16;
const LOG_BYTES: usize = 8 << 20;
const FOLLOWERS: usize = 1000;
const LINE: usize = 128;
const BEGUN: &str = "begun\r\n";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// Workspaces that push when they are let go; the one of `log` writes a log before. What they push is a manifest whose blobs
/// are there, so that the registry is not busy with them while it is asked for other builds.
struct Played {
    registry: Arc<DockerRegistry>,
    image: Vec<u8>,
    go: watch::Receiver<bool>,
    log_bytes: usize,
}

#[async_trait]
impl Work for Played {
    async fn build(&self, workspace: &Workspace) -> Result<(), String> {
        let target: ImageReference =
            workspace.annotation("ref").parse().map_err(|error| format!("{error}"))?;
        workspace.write(BEGUN);
        let mut go = self.go.clone();
        go.wait_for(|go| *go).await.map_err(|error| error.to_string())?;
        let (repository, tag) = (target.repository(), target.tag().unwrap_or_default());
        let pushed = self.registry.push_manifest(repository, tag, MANIFEST, &self.image).await;
        pushed.map_err(|error| error.to_string())?;
        if workspace.annotation("baseref").contains("/log") {
            for line in 0..self.log_bytes / LINE {
                workspace.write(&format!("{line:0width$}\r\n", width = LINE - 2));
                // As a build tool writes, not faster than its reader reads a ring.
                if line % 512 == 0 {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            }
        }
        Ok(())
    }
}

struct Plant {
    registry: Arc<DockerRegistry>,
    ws_manager: WsManager,
    fleet: Fleet,
    go: watch::Sender<bool>,
}

#[tokio::main]
async fn main() -> Result<()> {
    let scale: f64 = std::env::var("BENCH_SCALE").ok().map_or(Ok(1.0), |text| text.parse())?;
    let scaled = |count: usize| ((count as f64 * scale).ceil() as usize).max(2);
    let (go, going) = watch::channel(true);
    let registry = Arc::new(DockerRegistry::start().await?);
    let image = image(&registry, "workspace").await?;
    let work = Played { registry: registry.clone(), image, go: going, log_bytes: scaled(LOG_BYTES) };
    let ws_manager = WsManager::start(Arc::new(work)).await?;
    let (program, seed) = (program()?, OpenKey::new_seed()?);
    let address = ws_manager.address.to_string();
    let fleet =
        Fleet::start_on_ws_manager(&program, &registry, seed.expose_secret(), &ROLES, &address).await?;
    let plant = Plant { registry, ws_manager, fleet, go };
    for known in [true, false] {
        plant.dispatch(scaled(ALONE), scaled(ROUNDS), known).await?;
    }
    plant.fan_out(scaled(FOLLOWERS), scaled(LOG_BYTES)).await
}

impl Plant {
    async fn client(&self) -> Result<ImageBuilderClient<Channel>> {
        self.fleet.image_builder().await
    }

    /// A request for an image that nobody has built yet; `known`: of a base image that was asked for before.
    async fn request(&self, repository: &str, tag: &str, known: bool) -> Result<mk3::BuildRequest> {
        let manifest = image(&self.registry, repository).await?;
        let mut manifest: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(&manifest)?;
        manifest.insert("annotations".into(), serde_json::json!({"tag": tag}));
        let manifest = serde_json::to_string(&manifest)?;
        self.registry.push_manifest(repository, tag, MANIFEST, manifest.as_bytes()).await?;
        let reference = self.registry.reference(&format!("{repository}:{tag}"))?.to_string();
        if known {
            let question = mk3::ResolveBaseImageRequest { r#ref: reference.clone(), ..Default::default() };
            self.client().await?.resolve_base_image(question).await?;
        }
        let from = mk3::build_source::From::Ref(mk3::BuildSourceReference { r#ref: reference });
        Ok(mk3::BuildRequest { source: Some(mk3::BuildSource { from: Some(from) }), ..Default::default() })
    }

    /// One build, whose workspace ends once `go` is set: how long to StartWorkspace, and from its end to the client's
    /// knowledge of it.
    async fn build(&self, request: mk3::BuildRequest, started: &Barrier) -> Result<(Duration, Duration)> {
        let mut client = self.client().await?;
        let asked = Instant::now();
        let mut stream = client.build(request).await?.into_inner();
        // The second is of a workspace that has its URL: it runs.
        for _ in 0..2 {
            stream.message().await?.context("a message")?;
        }
        if started.wait().await.is_leader() {
            self.go.send_replace(true);
        }
        let done = last(&mut stream).await?;
        let told = Instant::now();
        ensure!(done.status() == mk3::BuildStatus::DoneSuccess, "{done:?}\n{}", self.fleet.log());
        let moments = self.ws_manager.moments(&done.r#ref);
        let started = moments.asked.context("no StartWorkspace")?;
        Ok((started - asked, told - moments.stopped.context("no STOPPED")?))
    }

    async fn dispatch(&self, alone: usize, rounds: usize, known: bool) -> Result<()> {
        let which = if known { "known" } else { "unknown" };
        let (mut starts, mut ends) = (Vec::new(), Vec::new());
        for number in 0..alone {
            self.go.send_replace(false);
            let request = self.request(which, &format!("alone-{number}"), known).await?;
            let (start, end) = self.build(request, &Barrier::new(1)).await?;
            starts.push(start);
            ends.push(end);
        }
        println!("of a base image that is {which} to the resolver:");
        println!("  Build to StartWorkspace, one at a time: {} (aim: p50 under 10 ms)", figures(&mut starts));
        println!("  STOPPED to done, one at a time: {} (aim: p50 under 20 ms)", figures(&mut ends));
        let (mut starts, mut ends, mut bare) = (Vec::new(), Vec::new(), Vec::new());
        for round in 0..rounds {
            self.go.send_replace(false);
            let tags = (0..AT_ONCE).map(|number| format!("together-{round}-{number}"));
            let mut requests = Vec::new();
            for tag in tags {
                requests.push(self.request(which, &tag, known).await?);
            }
            // Builds and their baseline in turns, so that both see the same machine.
            bare.extend(try_join_all((0..AT_ONCE).map(|_| self.bare())).await?);
            let started = Barrier::new(AT_ONCE);
            let built = requests.into_iter().map(|request| self.build(request, &started));
            for (start, end) in try_join_all(built).await? {
                starts.push(start);
                ends.push(end);
            }
        }
        println!("  Build to StartWorkspace, {AT_ONCE} at once: {}", figures(&mut starts));
        println!("    two appends and two HEADs, {AT_ONCE} at once: {}", figures(&mut bare));
        println!("  STOPPED to done, {AT_ONCE} at once: {} (aim: p50 under 20 ms)", figures(&mut ends));
        Ok(())
    }

    async fn bare(&self) -> Result<Duration> {
        let messages = [Bytes::from_static(&[b'x'; 1024]), Bytes::from_static(&[b'x'; 1024])];
        let appends =
            bare::publish_beside(&self.fleet.nats.url(), subject::JOURNAL_STREAM, &messages).await?;
        let target = self.registry.reference("nothing:1")?;
        let registry = OciRegistry::default();
        let begun = Instant::now();
        for _ in 0..2 {
            registry.digest(&target, &Access::anonymous(Duration::from_secs(10))).await?;
        }
        Ok(appends + begun.elapsed())
    }

    async fn fan_out(&self, followers: usize, log_bytes: usize) -> Result<()> {
        self.go.send_replace(false);
        let mut stream =
            self.client().await?.build(self.request("log", "1", true).await?).await?.into_inner();
        let first = stream.message().await?.context("no first message")?;
        let id = first.info.context("info")?.build_id;
        stream.message().await?.context("no second message")?;
        let mut logs = Vec::new();
        let mut client = self.client().await?;
        for number in 0..followers {
            // A hundred on each connection, as HTTP/2 has it.
            if number % 100 == 0 {
                client = self.client().await?;
            }
            let request = mk3::LogsRequest { build_id: id.clone(), ..Default::default() };
            logs.push(client.logs(request).await?.into_inner());
        }
        let expected = log_bytes / LINE * LINE + BEGUN.len();
        // From here on the supervisor is read: what came before would be in its ring, or not.
        let mut log = logs.pop().context("a follower")?;
        let head = log.message().await?.context("no log")?.content.len();
        self.go.send_replace(true);
        let begun = Instant::now();
        let reading = logs.into_iter().map(|mut log| async move {
            let mut bytes = 0;
            while let Some(chunk) = log.message().await? {
                bytes += chunk.content.len();
            }
            anyhow::Ok(bytes)
        });
        let first = async {
            let mut bytes = head;
            while let Some(chunk) = log.message().await? {
                bytes += chunk.content.len();
            }
            anyhow::Ok(bytes)
        };
        let (read, first, done) = tokio::join!(try_join_all(reading), first, last(&mut stream));
        let took = begun.elapsed();
        let mut read = read?;
        read.push(first?);
        ensure!(done?.status() == mk3::BuildStatus::DoneSuccess);
        let whole = read.iter().filter(|bytes| **bytes == expected).count();
        println!(
            "a log of {expected} bytes from a supervisor, {followers} followers: {whole} have all of it, and all streams \
             ended {took:.1?} after its first byte ({:.0} MB/s in all)",
            (expected * followers) as f64 / took.as_secs_f64() / 1e6
        );
        ensure!(whole == followers, "bytes were lost: {:?}", read.iter().min());
        Ok(())
    }
}

/// The manifest of an image in a repository; its blobs are pushed once.
async fn image(registry: &DockerRegistry, repository: &str) -> Result<Vec<u8>> {
    if let Some((_, manifest)) = registry.manifest(repository, "first").await? {
        return Ok(manifest);
    }
    registry.push_image(&format!("{repository}:first"), "linux/amd64", &[("a", b"a")]).await?;
    Ok(registry.manifest(repository, "first").await?.context("what was pushed")?.1)
}

async fn last(stream: &mut Streaming<mk3::BuildResponse>) -> Result<mk3::BuildResponse> {
    let mut last = None;
    while let Some(response) = stream.message().await? {
        last = Some(response);
    }
    last.context("no message")
}
