//! `kiln cache-warmer`.

use std::sync::Arc;

use anyhow::Context as _;
use async_trait::async_trait;
use kiln_builder::BaseImages;
use kiln_cache_warmer::{CachedLayers, LayerCaches, Parts, ROLE, Store, StoreError};
use kiln_credentials::Installation;
use kiln_domain::reference::{Digest, ImageReference};
use kiln_registry::{Access, OciRegistry, Tagged};
use prometheus_client::registry::Registry as Metrics;
use tokio::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;

use crate::config::{Config, Role};
use crate::roles::credentials;
use crate::roles::engine::{LAYERS, settings};
use crate::roles::host::Host;

/// How long a registry may take to answer one question of the sweep.
const ANSWER: Duration = Duration::from_secs(60);

pub(crate) async fn run(host: &Host, config: &Config, stop: CancellationToken) -> anyhow::Result<()> {
    let bus = host.connect(config, ROLE).await?;
    let section = config.cache_warmer.clone().unwrap_or_default();
    let store = if section.pull_bytes > 0 { store(config)? } else { None };
    let mut metrics = host.registry(ROLE);
    let layers = layers(config, &mut metrics).await?;
    let parts = Parts { bus: bus.clone(), metrics, store, layers };
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

/// The repository in which builds leave their layers, where this process knows which it is.
async fn layers(config: &Config, metrics: &mut Metrics) -> anyhow::Result<Option<Arc<dyn LayerCaches>>> {
    let (Some(local), Some(orchestrator)) = (config.engine.local(), &config.orchestrator) else {
        return Ok(None);
    };
    if !local.layer_cache.enabled {
        return Ok(None);
    }
    // What can't be parsed, the orchestrator refuses.
    let repository = local.layer_cache.repository(&orchestrator.base_image_repository);
    let Ok(repository) = repository.parse::<ImageReference>() else { return Ok(None) };
    let keychain = credentials::open(config, metrics).await?;
    let registries = config.registries(&orchestrator.plain_http);
    let registry = OciRegistry::new(kiln_registry::Config { registries, ..Default::default() });
    Ok(Some(Arc::new(LayersOfBuilds { registry, repository, keychain })))
}

struct LayersOfBuilds {
    registry: OciRegistry,
    repository: ImageReference,
    keychain: Arc<Installation>,
}

impl LayersOfBuilds {
    fn access(&self) -> Access {
        Access::new(self.keychain.clone(), Instant::now() + ANSWER)
    }
}

#[async_trait]
impl LayerCaches for LayersOfBuilds {
    async fn list(&self) -> Result<Vec<CachedLayers>, StoreError> {
        let tags = self.registry.tags(&self.repository, &self.access()).await;
        let mut caches = Vec::new();
        for tag in tags.map_err(|error| StoreError(error.to_string()))? {
            let Ok(reference) = format!("{}:{tag}", self.repository.name()).parse() else { continue };
            match self.registry.tagged(&reference, &self.access()).await {
                Ok(Some(Tagged { digest, bytes, created })) => caches.push(CachedLayers {
                    digest,
                    bytes,
                    written: created.and_then(|created| created.parse().ok()),
                }),
                Ok(None) => {}
                Err(error) => tracing::warn!("the layers of builds at {reference} can't be read: {error}"),
            }
        }
        Ok(caches)
    }

    async fn remove(&self, digest: &Digest) -> Result<(), StoreError> {
        let removed = self.registry.delete(&self.repository.pinned(digest), &self.access()).await;
        removed.map_err(|error| StoreError(error.to_string()))
    }
}
