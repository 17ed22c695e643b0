//! What an orchestrator counts. Each build is counted once, by the one whose append made it so.

use kiln_bus::journal::Entry;
use kiln_domain::record::State;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

use crate::PREFIX;

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Result {
    result: &'static str,
    reason: &'static str,
}

/// What image-builder-mk3's dashboards and alerts know, under its names. A build is started once it is accepted, so that
/// every started one is once done: also one that ends before it has a builder.
struct Mk3 {
    started: Counter,
    done: Family<Success, Counter>,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Success {
    success: &'static str,
}

impl Mk3 {
    fn register(registry: &mut Registry) -> Self {
        let mk3 = Self { started: Counter::default(), done: Family::default() };
        for success in ["true", "false"] {
            // Shown from the beginning, for rates.
            drop(mk3.done.get_or_create(&Success { success }));
        }
        let registry = registry.sub_registry_with_prefix("gitpod_image_builder");
        registry.register("builds_started", "Builds that were begun", mk3.started.clone());
        registry.register("builds_done", "Builds that ended, by success", mk3.done.clone());
        mk3
    }
}

pub(crate) struct Metrics {
    mk3: Mk3,
    started: Counter,
    retried: Counter,
    lost: Counter,
    lost_secrets: Counter,
    done: Family<Result, Counter>,
    seconds: Family<Result, Histogram, fn() -> Histogram>,
    pub(crate) running: Gauge,
    pub(crate) queued: Gauge,
}

impl Metrics {
    pub(crate) fn register(registry: &mut Registry) -> Self {
        let metrics = Self {
            mk3: Mk3::register(registry),
            started: Counter::default(),
            retried: Counter::default(),
            lost: Counter::default(),
            lost_secrets: Counter::default(),
            done: Family::default(),
            seconds: Family::new_with_constructor(|| Histogram::new(exponential_buckets(0.25, 2.0, 16))),
            running: Gauge::default(),
            queued: Gauge::default(),
        };
        let registry = registry.sub_registry_with_prefix(PREFIX);
        registry.register(
            "builds_started",
            "Builds whose first builder was started",
            metrics.started.clone(),
        );
        registry.register("builds_retried", "Attempts after a lost builder", metrics.retried.clone());
        registry.register(
            "builds_lost",
            "Builders ended because the journal lost their builds",
            metrics.lost.clone(),
        );
        registry.register(
            "secrets_lost",
            "Active builds whose entry in KILN_SECRETS was removed",
            metrics.lost_secrets.clone(),
        );
        registry.register("builds_done", "Builds that ended, by result and reason", metrics.done.clone());
        registry.register("build_seconds", "Time from accepted to ended", metrics.seconds.clone());
        registry.register("builds_running", "Builds that this process acts on", metrics.running.clone());
        registry.register(
            "builds_queued",
            "Builds that wait for a slot, of the whole installation",
            metrics.queued.clone(),
        );
        metrics
    }

    pub(crate) fn accepted(&self) {
        self.mk3.started.inc();
    }

    pub(crate) fn started(&self, entry: &Entry) {
        if entry.record.attempt == 1 {
            self.started.inc();
        }
    }

    pub(crate) fn retried(&self) {
        self.retried.inc();
    }

    pub(crate) fn lost(&self) {
        self.lost.inc();
    }

    pub(crate) fn lost_secrets(&self) {
        self.lost_secrets.inc();
    }

    pub(crate) fn ended(&self, entry: &Entry) {
        let record = &entry.record;
        let labels = Result {
            result: record.state.as_str(),
            reason: record.reason.map_or("", |reason| reason.as_str()),
        };
        self.done.get_or_create(&labels).inc();
        let success = if record.state == State::Succeeded { "true" } else { "false" };
        self.mk3.done.get_or_create(&Success { success }).inc();
        if let (Some(queued), Some(finished)) = (record.queued_at, record.finished_at) {
            self.seconds.get_or_create(&labels).observe(finished.duration_since(queued).as_secs_f64());
        }
    }
}
