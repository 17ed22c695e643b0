//! Base images in the store of this host's builds: pulled before a build asks for them, within a number of bytes.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use kiln_domain::reference::ImageReference;
use tokio::time::{Instant, sleep};

use crate::warm::Means;

/// How long an image is left alone that could not be pulled, or that there was no room for.
const LATER: Duration = Duration::from_secs(10 * 60);

/// Where the builds of this host look for the layers of their base images.
#[async_trait]
pub trait Store: Send + Sync {
    /// How much a pull of this image moves at most.
    async fn bytes(&self, image: &ImageReference) -> Result<u64, StoreError>;
    /// Brings it there, out of the way of builds. What is there already is not fetched again.
    async fn pull(&self, image: &ImageReference) -> Result<(), StoreError>;
    /// Gives it up.
    async fn remove(&self, image: &ImageReference) -> Result<(), StoreError>;
}

/// Why a store doesn't do it.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct StoreError(pub String);

pub(crate) struct Stock {
    store: Arc<dyn Store>,
    means: Means,
    most_bytes: u64,
    held: BTreeMap<String, Held>,
    later: BTreeMap<String, (ImageReference, Instant)>,
}

struct Held {
    image: ImageReference,
    bytes: u64,
}

impl Stock {
    pub(crate) fn new(store: Arc<dyn Store>, means: &Means, most_bytes: u64) -> Self {
        Self { store, means: means.clone(), most_bytes, held: BTreeMap::new(), later: BTreeMap::new() }
    }

    /// Keeps what is kept warm in the store too: one image after another, for ever.
    pub(crate) async fn keep(mut self, interval: Duration) {
        loop {
            let wanted: Vec<(String, ImageReference)> = self
                .means
                .shelf
                .list()
                .images
                .into_iter()
                .filter_map(|image| Some((image.reference, image.resolved.parse().ok()?)))
                .collect();
            self.give_up(&wanted).await;
            for (name, image) in wanted {
                self.take(name, image).await;
            }
            sleep(interval).await;
        }
    }

    /// Removes what is no longer kept warm.
    async fn give_up(&mut self, wanted: &[(String, ImageReference)]) {
        let is_wanted = |name: &String| wanted.iter().any(|(wanted, _)| wanted == name);
        let gone: Vec<String> = self.held.keys().filter(|name| !is_wanted(name)).cloned().collect();
        for name in gone {
            if let Some(held) = self.held.remove(&name) {
                self.remove(&held.image).await;
            }
        }
        self.later.retain(|name, _| is_wanted(name));
        self.show();
    }

    async fn take(&mut self, name: String, image: ImageReference) {
        let is_held = self.held.get(&name).is_some_and(|held| held.image == image);
        let is_later = self.later.get(&name).is_some_and(|(of, at)| *of == image && Instant::now() < *at);
        if is_held || is_later {
            return;
        }
        match self.pull(&name, &image).await {
            Ok(bytes) => {
                self.later.remove(&name);
                let before = self.held.insert(name, Held { image: image.clone(), bytes });
                self.means.metrics.pulled.inc();
                if let Some(before) = before {
                    self.remove(&before.image).await;
                }
            }
            Err(error) => {
                tracing::warn!("`{name}` is not in the store of builds: {error}");
                self.later.insert(name, (image, Instant::now() + LATER));
            }
        }
        self.show();
    }

    async fn pull(&self, name: &str, image: &ImageReference) -> Result<u64, StoreError> {
        let bytes = self.store.bytes(image).await?;
        // What it takes the place of goes with it.
        let others = self.held.iter().filter(|(held, _)| *held != name).map(|(_, held)| held.bytes);
        if others.fold(bytes, u64::saturating_add) > self.most_bytes {
            let most = self.most_bytes;
            return Err(StoreError(format!("its {bytes} bytes would make it more than {most} in all")));
        }
        self.store.pull(image).await.map(|()| bytes)
    }

    async fn remove(&self, image: &ImageReference) {
        // A tag's other name may still stand for it.
        if self.held.values().any(|held| held.image == *image) {
            return;
        }
        if let Err(error) = self.store.remove(image).await {
            tracing::debug!("{image} stays in the store of builds: {error}");
        }
    }

    fn show(&self) {
        let bytes = self.held.values().map(|held| held.bytes).fold(0, u64::saturating_add);
        self.means.metrics.stored.set(i64::try_from(bytes).unwrap_or(i64::MAX));
    }
}
