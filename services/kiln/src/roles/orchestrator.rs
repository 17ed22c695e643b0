//! `kiln orchestrator`.

use std::sync::Arc;

use kiln_domain::engine::Engine;
use kiln_orchestrator::{PREFIX, Parts, ROLE};
use prometheus_client::registry::Registry;
use tokio_util::sync::CancellationToken;

use crate::config::{Config, Role};
use crate::roles::credentials;
use crate::roles::host::Host;

pub(crate) async fn run(
    host: &Host,
    config: &Config,
    engine: Arc<dyn Engine>,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let bus = host.connect(config, ROLE).await?;
    let mut metrics = Registry::default();
    let installation = credentials::open(config, metrics.sub_registry_with_prefix(PREFIX)).await?;
    let section = config.orchestrator.clone().unwrap_or_default();
    let room = kiln_bus::journal::room_for(config.streams.journal_max_bytes.unsigned_abs());
    if room < section.max_queued as u64 {
        tracing::warn!(
            "`streams.journal_max_bytes` has room for {room} builds that aren't over: `orchestrator.max_queued`, {}, is never reached",
            section.max_queued
        );
    }
    let life = host.life().to_owned();
    let parts = Parts {
        bus: bus.clone(),
        engine,
        installation,
        open_key: config.open_key()?,
        life,
        lease: config.lease(),
        metrics,
    };
    let ready = |metrics| host.ready(Role::Orchestrator, &bus, metrics);
    let ran = kiln_orchestrator::run(section, parts, ready, stop).await;
    bus.close().await;
    ran
}
