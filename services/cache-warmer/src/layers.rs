//! The caches of layers that builds leave in a registry: the old ones, and the oldest where they are too large together, are
//! given up. A build whose cache is gone begins without.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;
use kiln_domain::reference::Digest;
use tokio::time::sleep;

use crate::config::Config;
use crate::metrics::Metrics;
use crate::store::StoreError;

/// Where builds leave their layers.
#[async_trait]
pub trait LayerCaches: Send + Sync {
    /// All that are there.
    async fn list(&self) -> Result<Vec<CachedLayers>, StoreError>;
    /// Removes a manifest, and with it each tag that holds it. One that isn't there is removed already.
    async fn remove(&self, digest: &Digest) -> Result<(), StoreError>;
}

/// What one tag holds.
#[derive(Clone, Debug)]
pub struct CachedLayers {
    /// Of its manifest, which other tags may hold too.
    pub digest: Digest,
    /// As they are moved, as if no other cache shared any of them.
    pub bytes: u64,
    /// When the cache was written last; none while it is being written.
    pub written: Option<Timestamp>,
}

/// Sweeps until it is dropped.
pub(crate) async fn keep_in_bounds(caches: Arc<dyn LayerCaches>, config: Config, metrics: Metrics) {
    let every = Duration::from_secs(config.layers_sweep_seconds);
    let mut unmarked = BTreeSet::new();
    loop {
        match caches.list().await {
            Ok(all) => {
                unmarked = sweep(&*caches, &config, &metrics, all, &unmarked).await;
            }
            Err(error) => tracing::warn!("the layers of builds can't be looked after: {error}"),
        }
        sleep(every).await;
    }
}

/// One sweep; the caches that nobody has marked with a time.
async fn sweep(
    caches: &dyn LayerCaches,
    config: &Config,
    metrics: &Metrics,
    all: Vec<CachedLayers>,
    unmarked_before: &BTreeSet<Digest>,
) -> BTreeSet<Digest> {
    let limits = Limits {
        max_age: Duration::from_secs(config.layers_max_age_hours.saturating_mul(3600)),
        max_bytes: config.layers_max_bytes,
    };
    let manifests: BTreeMap<Digest, CachedLayers> =
        all.into_iter().map(|cache| (cache.digest.clone(), cache)).collect();
    let given_up = limits.given_up(manifests.values(), now(), unmarked_before);
    for digest in &given_up {
        match caches.remove(digest).await {
            Ok(()) => drop(metrics.layers_removed.inc()),
            Err(error) => tracing::warn!("layers of builds stay in the registry: {error}"),
        }
    }
    let left = manifests.values().filter(|cache| !given_up.contains(&cache.digest));
    let bytes = left.clone().map(|cache| cache.bytes).fold(0, u64::saturating_add);
    metrics.layers.set(i64::try_from(bytes).unwrap_or(i64::MAX));
    left.filter(|cache| cache.written.is_none()).map(|cache| cache.digest.clone()).collect()
}

struct Limits {
    max_age: Duration,
    max_bytes: u64,
}

impl Limits {
    /// What is given up: what is too old, what was left without a time for as long as from one sweep to the next (its exporter
    /// died), and then the oldest until the rest is small enough.
    fn given_up<'a>(
        &self,
        all: impl Iterator<Item = &'a CachedLayers>,
        now: Timestamp,
        unmarked_before: &BTreeSet<Digest>,
    ) -> BTreeSet<Digest> {
        let age = |cache: &CachedLayers| {
            let age = cache.written.map(|written| now.duration_since(written));
            // One that is written, or that is of the future, is the youngest.
            age.and_then(|age| Duration::try_from(age).ok()).unwrap_or_default()
        };
        let mut youngest_first: Vec<_> = all.collect();
        youngest_first.sort_by_key(|cache| (age(cache), cache.digest.clone()));
        let mut bytes = 0_u64;
        let mut given_up = BTreeSet::new();
        for cache in youngest_first {
            let is_abandoned = cache.written.is_none() && unmarked_before.contains(&cache.digest);
            let is_too_old = age(cache) > self.max_age;
            let more = bytes.saturating_add(cache.bytes);
            if is_abandoned || is_too_old || more > self.max_bytes {
                given_up.insert(cache.digest.clone());
            } else {
                bytes = more;
            }
        }
        given_up
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "a cache's age is told by the time of day that it was marked with"
)]
fn now() -> Timestamp {
    Timestamp::now()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_given_up() {
        let now: Timestamp = "2026-11-24T12:00:00Z".parse().unwrap();
        let cache = |name: &str, bytes, hours: Option<i64>| CachedLayers {
            digest: Digest::of(name.as_bytes()),
            bytes,
            written: hours.map(|hours| now - jiff::SignedDuration::from_hours(hours)),
        };
        let all = [
            cache("young", 40, Some(1)),
            cache("older", 40, Some(2)),
            cache("small", 10, Some(3)),
            cache("old", 1, Some(25)),
            cache("future", 1, Some(-5)),
            cache("being written", 1, None),
            cache("left half", 1, None),
        ];
        let before = BTreeSet::from([Digest::of(b"left half")]);
        for (max_bytes, expected) in [
            (1_000, vec!["old", "left half"]),
            (92, vec!["old", "left half"]),
            (91, vec!["small", "old", "left half"]),
            // What is too large for what is left makes way for what is not.
            (60, vec!["older", "old", "left half"]),
            (0, all.each_ref().map(|_| "").to_vec()),
        ] {
            let limits = Limits { max_age: Duration::from_secs(24 * 3600), max_bytes };
            let given_up = limits.given_up(all.iter(), now, &before);
            if max_bytes == 0 {
                assert_eq!(given_up.len(), expected.len());
                continue;
            }
            let expected: BTreeSet<_> = expected.iter().map(|name| Digest::of(name.as_bytes())).collect();
            assert_eq!(given_up, expected, "{max_bytes}");
        }
    }
}
