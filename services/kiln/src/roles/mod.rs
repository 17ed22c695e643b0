//! The roles, each as a process of its own; `kiln up` runs the same five in one.

pub(crate) mod builder;
pub(crate) mod cache_warmer;
pub(crate) mod credentials;
pub(crate) mod engine;
pub(crate) mod export_layers;
pub(crate) mod gateway;
pub(crate) mod host;
pub(crate) mod keep_buildkitd;
pub(crate) mod log_relay;
pub(crate) mod orchestrator;
pub(crate) mod resolver;
pub(crate) mod supervise;

use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::Context as _;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::config::{Config, Loaded, Role};
use crate::roles::host::Host;

/// What each role takes.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// The JSON file of the services, or that of an image-builder-mk3, in which further keys are Kiln's; KILN_… variables lie
    /// over it (KILN_NATS__URL is `nats.url`)
    #[arg(long, value_name = "FILE", env = "KILN_CONFIG")]
    config: Option<PathBuf>,
}

/// Runs one role until `stop`.
pub(crate) async fn run(options: Options, role: Role, stop: CancellationToken) -> anyhow::Result<()> {
    let config = Loaded::checked(options.config.as_deref(), &[role])?.noted();
    let health = listen("listen.health", config.listen.health).await?;
    let metrics = listen("listen.metrics", config.listen.metrics).await?;
    let host = Host::start(health, metrics, &[role], String::new());
    let ran = play(&host, &config, role, stop).await;
    host.end().await;
    ran
}

async fn play(host: &Host, config: &Config, role: Role, stop: CancellationToken) -> anyhow::Result<()> {
    let takes = host.provision(config, None).await?;
    match role {
        Role::Gateway => {
            let listener = listen("listen.grpc", config.listen.grpc).await?;
            gateway::run(host, config, listener, takes, stop).await
        }
        Role::Resolver => resolver::run(host, config, stop).await,
        Role::Orchestrator => {
            let engine = engine::open(config, host).await?;
            let ran = orchestrator::run(host, config, engine.engine(), stop).await;
            engine.close().await;
            ran
        }
        Role::LogRelay => {
            let engine = engine::open(config, host).await?;
            let ran = log_relay::run(host, config, engine.engine(), stop).await;
            engine.close().await;
            ran
        }
        Role::CacheWarmer => cache_warmer::run(host, config, stop).await,
    }
}

async fn listen(key: &str, address: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| format!("`{key}`: can't listen on {address}"))
}
