//! `kiln cache-warmer`.

use std::sync::Arc;

use anyhow::Context as _;
use async_trait::async_trait;
use kiln_builder::BaseImages;
use kiln_cache_warmer::{Parts, ROLE, Store, StoreError};
use kiln_domain::reference::ImageReference;
use tokio_util::sync::CancellationToken;

use crate::config::{Config, Role};
use crate::roles::engine::{LAYERS, settings};
use crate::roles::host::Host;

pub(crate) async fn run(host: &Host, config: &Config, stop: CancellationToken) -> anyhow::Result<()> {
    let bus = host.connect(config, ROLE).await?;
    let section = config.cache_warmer.clone().unwrap_or_default();
    let store = if section.pull_bytes > 0 { store(config)? } else { None };
    let parts = Parts { bus: bus.clone(), metrics: host.registry(ROLE), store };
    let ready = |metrics| host.ready(Role::CacheWarmer, &bus, metrics);
    let ran = kiln_cache_warmer::run(section, parts, ready, stop).await;
    bus.close().await;
    ran
}

/// The store of this host's builds.
fn store(config: &Config) -> anyhow::Result<Option<Arc<dyn Store>>> {
    let Some(local) = config.engine.local() else { return Ok(None) };
    let mut settings = settings(local, local.folder.join(LAYERS));
    settings.registries = config.registries(&config.orchestrator.clone().unwrap_or_default().plain_http);
    let images = BaseImages::open(&settings).context("`cache_warmer.pull_bytes`: the store of builds")?;
    if images.is_none() {
        tracing::warn!(
            "`cache_warmer.pull_bytes` is of no use: builds use BuildKit, which has a store of its own"
        );
    }
    Ok(images.map(|images| Arc::new(StoreOfBuilds(images)) as Arc<dyn Store>))
}

struct StoreOfBuilds(BaseImages);

#[async_trait]
impl Store for StoreOfBuilds {
    async fn bytes(&self, image: &ImageReference) -> Result<u64, StoreError> {
        self.0.bytes(image).await.map_err(|error| StoreError(error.to_string()))
    }

    async fn pull(&self, image: &ImageReference) -> Result<(), StoreError> {
        self.0.pull(image).await.map_err(|error| StoreError(error.to_string()))
    }

    async fn remove(&self, image: &ImageReference) -> Result<(), StoreError> {
        self.0.remove(image).await.map_err(|error| StoreError(error.to_string()))
    }
}
