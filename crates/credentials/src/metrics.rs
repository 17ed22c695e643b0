//! What is counted of an installation's credentials.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct From {
    source: &'static str,
}

#[derive(Clone)]
pub(crate) struct Metrics {
    broken: Gauge,
    failed: Family<From, Counter>,
}

impl Metrics {
    pub(crate) fn register(registry: &mut Registry) -> Self {
        let metrics = Self { broken: Gauge::default(), failed: Family::default() };
        registry.register(
            "credentials_file_broken",
            "1 while the Docker config file can't be read, and what it said before is used",
            metrics.broken.clone(),
        );
        registry.register(
            "credentials_failed",
            "Times that a credential of the installation could not be had, by where from",
            metrics.failed.clone(),
        );
        metrics
    }

    pub(crate) fn file_read(&self) {
        self.broken.set(0);
    }

    pub(crate) fn file_broken(&self) {
        self.broken.set(1);
    }

    pub(crate) fn source_failed(&self, source: &'static str) {
        self.failed.get_or_create(&From { source }).inc();
    }
}
