//! `kiln resolver`.

use std::sync::Arc;

use anyhow::Context as _;
use kiln_registry::OciRegistry;
use kiln_resolver::{Parts, ROLE};
use tokio_util::sync::CancellationToken;

use crate::config::{Config, Role};
use crate::roles::credentials;
use crate::roles::host::Host;

pub(crate) async fn run(host: &Host, config: &Config, stop: CancellationToken) -> anyhow::Result<()> {
    let bus = host.connect(config, ROLE).await?;
    let open_key = config.open_key()?;
    bus.check_seal_key(&open_key.seal_key()).await.context("join who lives")?;
    let mut metrics = host.registry(ROLE);
    let installation = credentials::open(config, &mut metrics).await?;
    let section = config.resolver.clone().unwrap_or_default();
    let registries = config.registries(&section.plain_http);
    let http = kiln_registry::Config { registries: registries.clone(), ..kiln_registry::Config::default() };
    let parts = Parts {
        bus: bus.clone(),
        registry: Arc::new(OciRegistry::new(http)),
        registries,
        installation,
        open_key,
        metrics,
    };
    let ready = |metrics| host.ready(Role::Resolver, &bus, metrics);
    let ran = kiln_resolver::run(section, parts, ready, stop).await;
    bus.close().await;
    ran
}
