//! `kiln cache-warmer`.

use kiln_cache_warmer::{Parts, ROLE};
use tokio_util::sync::CancellationToken;

use crate::config::{Config, Role};
use crate::roles::host::Host;

pub(crate) async fn run(host: &Host, config: &Config, stop: CancellationToken) -> anyhow::Result<()> {
    let bus = host.connect(config, ROLE).await?;
    let parts = Parts { bus: bus.clone(), metrics: host.registry(ROLE) };
    let ready = |metrics| host.ready(Role::CacheWarmer, &bus, metrics);
    let ran =
        kiln_cache_warmer::run(config.cache_warmer.clone().unwrap_or_default(), parts, ready, stop).await;
    bus.close().await;
    ran
}
