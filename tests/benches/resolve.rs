//! References resolved a second through a gateway and a resolver, each a process of its own, each figure beside its
//! baseline, measured by turns in the same run. Prints, and asserts only that the answers are right.
//!
//! - warm, [`CALLERS`] at once: beside a bare tonic server that answers health checks;
//! - cold: beside the registry's own HEAD rate;
//! - warm with the registry away: beside warm.

#![expect(
    clippy::print_stdout,
    clippy::disallowed_methods,
    clippy::indexing_slicing,
    reason = "a benchmark measures time, prints figures, and may end where a test may"
)]

mod figures;

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use kiln_proto::kiln_v1::ResolveBaseImageRequest;
use kiln_proto::kiln_v1::builds_client::BuildsClient;
use kiln_testkit::fleet::Fleet;
use kiln_testkit::installation::program;
use kiln_testkit::registry::DockerRegistry;
use tokio::net::TcpListener;
use tonic::transport::Channel;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;

use crate::figures::figures;

const CALLERS: usize = 64;
const CONNECTIONS: usize = 8;
const TAGS: usize = 400;
/// Calls of one turn. All turns together take less than the 30 s for which an answer is fresh.
const CALLS: usize = 12_000;
const TURNS: usize = 3;

/// What one turn of calls came to.
struct Turn {
    per_second: f64,
    took: Vec<Duration>,
}

impl Turn {
    fn shown(&mut self) -> String {
        format!("{:.0}/s, {}", self.per_second, figures(&mut self.took))
    }
}

#[tokio::main]
async fn main() -> Result<()> {
    let mut registry = DockerRegistry::start().await?;
    for n in 0..TAGS {
        registry.push_image(&name(n), "linux/amd64", &[("n", n.to_string().as_bytes())]).await?;
    }
    let references: Vec<String> =
        (0..TAGS).map(|n| Ok(registry.reference(&name(n))?.to_string())).collect::<Result<_>>()?;
    let seed = kiln_bus::seal::OpenKey::new_seed()?;
    let seed = secrecy::ExposeSecret::expose_secret(&seed);
    let fleet = Fleet::start(&program()?, &registry, seed, &["gateway", "resolver"]).await?;
    let gateway = fleet.address("gateway")?;
    let bare = bare_server().await?;

    let mut heads = heads(&references).await?;
    println!("the registry's own HEAD, {CALLERS} at once: {}", heads.shown());
    let mut cold = resolve(&gateway, &references, TAGS).await?;
    println!(
        "cold, {TAGS} tags, {CALLERS} at once: {}; of the registry's HEAD rate: {:.2} (each is a HEAD and a GET of the manifest and of its config)",
        cold.shown(),
        cold.per_second / heads.per_second
    );

    let begun = Instant::now();
    let mut ratios = Vec::new();
    for _ in 0..TURNS {
        let mut echo = check(&bare).await?;
        let mut warm = resolve(&gateway, &references, CALLS).await?;
        println!("warm: {}; bare tonic: {}", warm.shown(), echo.shown());
        ratios.push(warm.per_second / echo.per_second);
    }
    ratios.sort_by(f64::total_cmp);
    println!(
        "warm beside bare tonic, by turns: {:.2} (median; from {:.2} to {:.2}; aim: at least 0.5)",
        ratios[TURNS / 2],
        ratios[0],
        ratios[TURNS - 1]
    );
    let mut warm = resolve(&gateway, &references, CALLS).await?;
    registry.stop();
    let mut away = resolve(&gateway, &references, CALLS).await?;
    println!(
        "warm: {}; with the registry away: {}; ratio {:.2}",
        warm.shown(),
        away.shown(),
        away.per_second / warm.per_second
    );
    let fresh_for = Duration::from_secs(30);
    if begun.elapsed() > fresh_for {
        println!("note: this machine took {:.0?}: some answers were asked for anew", begun.elapsed());
    }
    // Later than any answer is fresh: all are given as old ones, after the registry was asked in vain.
    tokio::time::sleep(fresh_for.saturating_sub(begun.elapsed())).await;
    let mut stale = resolve(&gateway, &references, TAGS).await?;
    println!("no longer fresh, the registry away: {}", stale.shown());
    Ok(())
}

fn name(n: usize) -> String {
    format!("app-{n}:1")
}

/// Makes `calls` calls, [`CALLERS`] at once.
async fn turn<F>(calls: usize, call: impl Fn(usize) -> F) -> Result<Turn>
where
    F: Future<Output = Result<()>> + Send + 'static,
{
    let timed = |call: F| async move {
        let begun = Instant::now();
        call.await.map(|()| begun.elapsed())
    };
    let begun = Instant::now();
    let took: Vec<Duration> = stream::iter(0..calls)
        .map(|n| tokio::spawn(timed(call(n))))
        .buffer_unordered(CALLERS)
        .map(|ended| ended?)
        .try_collect()
        .await?;
    Ok(Turn { per_second: calls as f64 / begun.elapsed().as_secs_f64(), took })
}

async fn channels(address: &str) -> Result<Vec<Channel>> {
    let mut channels = Vec::new();
    for _ in 0..CONNECTIONS {
        channels.push(Channel::from_shared(format!("http://{address}"))?.connect().await?);
    }
    Ok(channels)
}

async fn resolve(gateway: &str, references: &[String], calls: usize) -> Result<Turn> {
    let channels = channels(gateway).await?;
    turn(calls, |n| {
        let mut client = BuildsClient::new(channels[n % CONNECTIONS].clone());
        let reference = references[n % references.len()].clone();
        async move {
            let request = ResolveBaseImageRequest { r#ref: reference, ..Default::default() };
            let answer = client.resolve_base_image(request).await?.into_inner();
            ensure!(answer.r#ref.contains("@sha256:"), "{answer:?}");
            Ok(())
        }
    })
    .await
}

async fn check(address: &str) -> Result<Turn> {
    let channels = channels(address).await?;
    turn(CALLS, |n| {
        let mut client = HealthClient::new(channels[n % CONNECTIONS].clone());
        async move {
            client.check(HealthCheckRequest { service: String::new() }).await?;
            Ok(())
        }
    })
    .await
}

async fn heads(references: &[String]) -> Result<Turn> {
    let client = reqwest::Client::builder().no_proxy().tls_certs_only([]).build()?;
    turn(TAGS, |n| {
        let (client, reference) = (client.clone(), references[n].clone());
        async move {
            let (host, name) = reference.split_once('/').context("a host")?;
            let (name, tag) = name.rsplit_once(':').context("a tag")?;
            let request = client
                .head(format!("http://{host}/v2/{name}/manifests/{tag}"))
                .header("accept", kiln_testkit::registry::OCI_MANIFEST);
            let answer = request.send().await?;
            if !answer.status().is_success() {
                bail!("HEAD: {}", answer.status());
            }
            Ok(())
        }
    })
    .await
}

/// A tonic server that does nothing but answer.
async fn bare_server() -> Result<String> {
    let (_, health) = tonic_health::server::health_reporter();
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?.to_string();
    let incoming = tonic::transport::server::TcpIncoming::from(listener).with_nodelay(Some(true));
    let serving = tonic::transport::Server::builder().add_service(health).serve_with_incoming(incoming);
    tokio::spawn(serving);
    Ok(address)
}
