//! `kiln up`: all of Kiln on one machine. The five services run in this process, NATS and a registry as its children,
//! builders as processes that outlive it and are adopted by the next.

mod backing;
mod child;
mod data_dir;
mod nats;
mod ports;
mod programs;
mod registry;
mod services;
mod settings;

use std::io::Write as _;
use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::Context as _;
use kiln_bus::seal::OpenKey;
use kiln_domain::run_folder::Builder;
use serde::Serialize;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use self::backing::Backing;
use self::data_dir::DataDir;
use self::ports::{Ports, reachable};
use crate::config::{Config, Loaded};

pub(crate) use self::data_dir::LOCK;
pub(crate) use self::programs::{bootstrap_folder, default_data_dir};

pub(crate) const ENDPOINTS: &str = "endpoints.json";
/// The configuration that it last ran with, without secrets: `kiln doctor` goes by it.
pub(crate) const CONFIGURATION: &str = "configuration.json";
const SEAL_KEY: &str = "seal.key";

/// `kiln up`
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Where everything is kept [default: $XDG_DATA_HOME/kiln, or ~/.local/share/kiln]
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Where the gRPC API listens; like the others, port 0 picks one at the first start and keeps it [default: that of
    /// an image-builder-mk3's --config, or 127.0.0.1:8080]
    #[arg(long, value_name = "ADDRESS")]
    grpc_listen: Option<SocketAddr>,
    /// Where the registry listens
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:5000")]
    registry_listen: SocketAddr,
    /// Where NATS listens
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:4222")]
    nats_listen: SocketAddr,
    /// Where /live and /ready are answered
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:9501")]
    health_listen: SocketAddr,
    /// Where /metrics is answered
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:9500")]
    metrics_listen: SocketAddr,
    /// Use this registry, which runs already, and start none
    #[arg(long, value_name = "HOST:PORT", conflicts_with = "registry_listen")]
    registry: Option<String>,
    /// Use this NATS server, which runs already, and start none; credentials are `nats.user` and `nats.password` of
    /// --config, or KILN_NATS__USER and KILN_NATS__PASSWORD
    #[arg(long, value_name = "URL", env = "KILN_NATS_URL", conflicts_with = "nats_listen")]
    nats_url: Option<String>,
    /// What executes Dockerfiles: `auto`, which is BuildKit where it is found, `buildkit` or `buildah`
    #[arg(long, value_name = "TOOL", value_parser = builder)]
    builder: Option<Builder>,
    /// Use this BuildKit daemon, at tcp://HOST:PORT or unix:///PATH, instead of Kiln's own; may be given several times.
    /// The certificates for tcp:// are `engine.local.buildkit.tls` of --config
    #[arg(long = "buildkit-addr", value_name = "ADDRESS")]
    buildkit_addresses: Vec<String>,
    /// Admit file:// git remotes
    #[arg(long)]
    allow_file_contexts: bool,
    /// The JSON file of the services; what is started here, and the flags, go before it. Or that of an image-builder-mk3, in
    /// which further keys are Kiln's: its registry is used then, and none is started
    #[arg(long, value_name = "FILE", env = "KILN_CONFIG")]
    config: Option<PathBuf>,
    /// The nats-server to run
    #[arg(long, value_name = "FILE", env = "KILN_NATS_SERVER", hide = true)]
    nats_program: Option<PathBuf>,
    /// The registry to run
    #[arg(long, value_name = "FILE", env = "KILN_REGISTRY", hide = true)]
    registry_program: Option<PathBuf>,
}

fn builder(text: &str) -> Result<Builder, String> {
    match text {
        "auto" => Ok(Builder::Auto),
        "buildkit" => Ok(Builder::Buildkit),
        "buildah" => Ok(Builder::Buildah),
        _ => Err("expected auto, buildkit or buildah".into()),
    }
}

/// What `endpoints.json` holds: `host:port` each, but for NATS.
#[derive(Debug, Serialize)]
struct Endpoints {
    grpc: String,
    registry: String,
    health: String,
    metrics: String,
    /// The URL of the user that may read the events.
    nats: String,
}

/// Our own listeners.
struct Listeners {
    grpc: TcpListener,
    health: TcpListener,
    metrics: TcpListener,
}

/// Runs all of it until `stop`, or until a part of it can't go on.
pub(crate) async fn run(mut options: Options, stop: CancellationToken) -> anyhow::Result<()> {
    let path = options
        .data_dir
        .clone()
        .or_else(programs::default_data_dir)
        .context("--data-dir is needed: there is no HOME to keep data in")?;
    let data = DataDir::open(&path)?;
    data.remove(ENDPOINTS)?;
    let loaded = Loaded::read(options.config.as_deref())?;
    if options.registry.is_none() {
        options.registry = settings::registry_that_is_there(&loaded)?;
    }
    let its_grpc = loaded.mk3_grpc;
    let config = loaded.noted();
    let mut ports = Ports::open(&data)?;
    let grpc = options.grpc_listen.or(its_grpc).unwrap_or(crate::config::DEFAULT_GRPC);
    let grpc = ports.listen("--grpc-listen", grpc).await?;
    let health = ports.listen("--health-listen", options.health_listen).await?;
    let metrics = ports.listen("--metrics-listen", options.metrics_listen).await?;
    let listeners = Listeners { grpc: own(grpc)?, health: own(health)?, metrics: own(metrics)? };
    let Some(backing) = stop.run_until_cancelled(Backing::start(&options, &data, &mut ports)).await else {
        return Ok(());
    };
    let backing = backing?;
    let served = serve(&options, &data, config, &backing, listeners, stop).await;
    backing.stop().await;
    served.and(data.remove(ENDPOINTS).map_err(Into::into))
}

async fn serve(
    options: &Options,
    data: &DataDir,
    config: Config,
    backing: &Backing,
    listeners: Listeners,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let fresh = OpenKey::new_seed().context("make the seal key")?;
    data.secret(SEAL_KEY, || fresh)?;
    let config = settings::complete(config, options, data, backing)?;
    data.write(CONFIGURATION, &format!("{}\n", serde_json::to_string_pretty(&config)?))?;
    let endpoints = endpoints(backing, &listeners)?;
    let announce = || {
        data.write(ENDPOINTS, &format!("{}\n", serde_json::to_string(&endpoints)?))?;
        say_ready(&endpoints).context("say on standard output that it is ready")
    };
    services::run(config, data, listeners, announce, stop).await
}

fn own(listener: std::net::TcpListener) -> anyhow::Result<TcpListener> {
    listener.set_nonblocking(true)?;
    Ok(TcpListener::from_std(listener)?)
}

fn endpoints(backing: &Backing, listeners: &Listeners) -> std::io::Result<Endpoints> {
    let address = |listener: &TcpListener| listener.local_addr().map(|at| reachable(at).to_string());
    Ok(Endpoints {
        grpc: address(&listeners.grpc)?,
        registry: backing.registry.address.clone(),
        health: address(&listeners.health)?,
        metrics: address(&listeners.metrics)?,
        nats: backing.nats.subscriber_url(),
    })
}

fn say_ready(endpoints: &Endpoints) -> std::io::Result<()> {
    let Endpoints { grpc, registry, health, metrics, .. } = endpoints;
    let mut out = std::io::stdout().lock();
    writeln!(out, "kiln is ready: grpc {grpc} registry {registry} health {health} metrics {metrics}")?;
    out.flush()
}
