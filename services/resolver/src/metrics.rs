//! What a resolver counts, besides the questions themselves.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

/// Where an image's answer came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum From {
    Cache,
    Registry,
    /// A mirror of the registry.
    Mirror,
    /// Another replica's question to the registry, which was waited for.
    Replica,
    /// The cache: not long ago, the image was not there.
    Missing,
    /// The cache, as the registry could not be asked.
    Stale,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Source {
    from: &'static str,
}

#[derive(Clone)]
pub(crate) struct Metrics {
    images: Family<Source, Counter>,
    pauses: Counter,
    remotes: Counter,
}

impl Metrics {
    pub(crate) fn register(registry: &mut Registry) -> Self {
        let metrics =
            Self { images: Family::default(), pauses: Counter::default(), remotes: Counter::default() };
        registry.register(
            "resolver_images",
            "Images resolved, by where the answer came from",
            metrics.images.clone(),
        );
        registry.register("registry_pauses", "Times a registry asked for a pause", metrics.pauses.clone());
        registry.register("git_remotes_asked", "Git remotes asked", metrics.remotes.clone());
        metrics
    }

    pub(crate) fn image_answered(&self, from: From) {
        let from = match from {
            From::Cache => "cache",
            From::Registry => "registry",
            From::Mirror => "mirror",
            From::Replica => "replica",
            From::Missing => "missing",
            From::Stale => "stale",
        };
        self.images.get_or_create(&Source { from }).inc();
    }

    pub(crate) fn paused(&self) {
        self.pauses.inc();
    }

    pub(crate) fn remote_asked(&self) {
        self.remotes.inc();
    }
}
