//! The five services in one process: the same code as apart, each with its own connection.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use rand::RngExt as _;
use tokio::task::{JoinError, JoinSet};
use tokio_util::sync::CancellationToken;

use super::Listeners;
use super::data_dir::DataDir;
use crate::config::{Config, Role};
use crate::roles::host::Host;
use crate::roles::{cache_warmer, engine, gateway, log_relay, orchestrator, resolver};

/// How long the services may take to let go of what they hold.
const GRACE: Duration = Duration::from_secs(20);

/// What this process marks its leases with; the next finds it here.
const LIFE: &str = "life";

type Roles = JoinSet<(&'static str, anyhow::Result<()>)>;

/// Runs them until `stop`, or until one of them ends, which is an error. `announce` is called once all are ready.
pub(crate) async fn run(
    config: Config,
    data: &DataDir,
    listeners: Listeners,
    announce: impl FnOnce() -> anyhow::Result<()>,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let Listeners { grpc, health, metrics } = listeners;
    let life = format!("{:032x}", rand::rng().random::<u128>());
    let host = Arc::new(Host::start(health, metrics, &Role::ALL, life.clone()));
    let config = Arc::new(config);
    // The lock of the data directory says that the former life is over: what it held needn't wait for its leases.
    let takes = host.provision(&config, data.read(LIFE)?.as_deref()).await?;
    data.write(LIFE, &life)?;
    let engine = engine::open(&config, &host).await?;
    let stop = stop.child_token();
    let mut roles = Roles::new();
    {
        let (host, config, stop) = (host.clone(), config.clone(), stop.clone());
        roles.spawn(async move { ("gateway", gateway::run(&host, &config, grpc, takes, stop).await) });
    }
    {
        let (host, config, stop) = (host.clone(), config.clone(), stop.clone());
        roles.spawn(async move { ("resolver", resolver::run(&host, &config, stop).await) });
    }
    {
        let (host, config, stop, engine) = (host.clone(), config.clone(), stop.clone(), engine.engine());
        roles.spawn(async move { ("orchestrator", orchestrator::run(&host, &config, engine, stop).await) });
    }
    {
        let (host, config, stop, engine) = (host.clone(), config.clone(), stop.clone(), engine.engine());
        roles.spawn(async move { ("log-relay", log_relay::run(&host, &config, engine, stop).await) });
    }
    {
        let (host, config, stop) = (host.clone(), config.clone(), stop.clone());
        roles.spawn(async move { ("cache-warmer", cache_warmer::run(&host, &config, stop).await) });
    }
    let ran = until_stopped(&host, &mut roles, announce, &stop).await;
    stop.cancel();
    let ended = end(&mut roles).await;
    engine.close().await;
    host.end().await;
    ran.and(ended)
}

async fn until_stopped(
    host: &Host,
    roles: &mut Roles,
    announce: impl FnOnce() -> anyhow::Result<()>,
    stop: &CancellationToken,
) -> anyhow::Result<()> {
    // Biased: a role that ends because it is asked to has not ended too early.
    tokio::select! {
        biased;
        () = stop.cancelled() => return Ok(()),
        () = host.all_ready() => announce()?,
        Some(first) = roles.join_next() => return Err(too_early(first)),
    }
    tokio::select! {
        biased;
        () = stop.cancelled() => Ok(()),
        Some(first) = roles.join_next() => Err(too_early(first)),
    }
}

fn too_early(first: Result<(&'static str, anyhow::Result<()>), JoinError>) -> anyhow::Error {
    match first {
        Ok((role, Ok(()))) => anyhow!("the {role} ended without being asked to"),
        Ok((role, Err(error))) => error.context(format!("the {role} ended")),
        Err(error) => anyhow!(error).context("a service ended"),
    }
}

/// Waits for all of them; the first error of one that could not end in order.
async fn end(roles: &mut Roles) -> anyhow::Result<()> {
    let all = async {
        let mut result = Ok(());
        while let Some(ended) = roles.join_next().await {
            let ended = match ended {
                Ok((role, ended)) => ended.with_context(|| format!("the {role} did not end in order")),
                Err(error) => Err(error.into()),
            };
            result = result.and(ended);
        }
        result
    };
    tokio::time::timeout(GRACE, all)
        .await
        .with_context(|| format!("services did not end within {} s", GRACE.as_secs()))?
}
