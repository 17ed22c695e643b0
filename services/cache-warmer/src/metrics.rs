//! What a cache-warmer counts, for each image of its list.

use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub(crate) struct Image {
    pub(crate) reference: String,
}

#[derive(Clone)]
pub(crate) struct Metrics {
    pub(crate) age: Family<Image, Gauge<f64, AtomicU64>>,
    pub(crate) refreshed: Family<Image, Counter>,
    pub(crate) failed: Family<Image, Counter>,
    pub(crate) over_budget: Family<Image, Counter>,
    pub(crate) pulled: Counter,
    pub(crate) stored: Gauge,
    pub(crate) layers: Gauge,
    pub(crate) layers_removed: Counter,
}

impl Metrics {
    pub(crate) fn register(registry: &mut Registry) -> Self {
        let metrics = Self {
            age: Family::default(),
            refreshed: Family::default(),
            failed: Family::default(),
            over_budget: Family::default(),
            pulled: Counter::default(),
            stored: Gauge::default(),
            layers: Gauge::default(),
            layers_removed: Counter::default(),
        };
        let age = "Age of the resolver's answer, at the last look";
        registry.register_with_unit("refs_age", age, Unit::Seconds, metrics.age.clone());
        registry.register("refs_refreshed", "Answers refreshed", metrics.refreshed.clone());
        let failed = "Looks that found no answer, or a stale one";
        registry.register("refs_failed", failed, metrics.failed.clone());
        let over_budget = "Answers left to become older, as their registry's budget was used up";
        registry.register("refs_over_budget", over_budget, metrics.over_budget.clone());
        registry.register("refs_pulled", "Images pulled into the store of builds", metrics.pulled.clone());
        let stored = "Bytes that were pulled for the images in the store of builds";
        registry.register_with_unit("refs_stored", stored, Unit::Bytes, metrics.stored.clone());
        let layers = "Bytes of the layers that builds left in the registry, as if none was shared";
        registry.register_with_unit("layers", layers, Unit::Bytes, metrics.layers.clone());
        let removed = "Caches of layers that were given up";
        registry.register("layers_removed", removed, metrics.layers_removed.clone());
        metrics
    }

    /// Of an image that is no longer kept warm nothing is counted: the set of labels stays bounded.
    pub(crate) fn forget(&self, image: &Image) {
        self.age.remove(image);
        self.refreshed.remove(image);
        self.failed.remove(image);
        self.over_budget.remove(image);
    }
}
