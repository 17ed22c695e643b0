//! `kiln gateway`.

use anyhow::Context as _;
use kiln_bus::keeper::Takes;
use kiln_gateway::{Parts, ROLE};
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::config::{Config, Role};
use crate::roles::host::Host;

pub(crate) async fn run(
    host: &Host,
    config: &Config,
    listener: TcpListener,
    takes: Takes,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let bus = host.connect(config, ROLE).await?;
    let seal_key = config.seal_key()?;
    bus.check_seal_key(&seal_key).await.context("join who lives")?;
    let metrics = Registry::default();
    let parts = Parts { bus: bus.clone(), seal_key, listener, metrics, takes };
    let ready = |metrics| host.ready(Role::Gateway, &bus, metrics);
    let ran = kiln_gateway::run(config.gateway(), parts, ready, stop).await;
    bus.close().await;
    ran
}
