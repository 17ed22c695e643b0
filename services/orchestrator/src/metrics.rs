//! What an orchestrator counts. Each build is counted once, by the one whose append made it so.

use kiln_bus::journal::Entry;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Result {
    result: &'static str,
    reason: &'static str,
}

pub(crate) struct Metrics {
    started: Counter,
    retried: Counter,
    lost: Counter,
    done: Family<Result, Counter>,
    seconds: Family<Result, Histogram, fn() -> Histogram>,
    pub(crate) running: Gauge,
    pub(crate) queued: Gauge,
}

impl Metrics {
    pub(crate) fn register(registry: &mut Registry) -> Self {
        let metrics = Self {
            started: Counter::default(),
            retried: Counter::default(),
            lost: Counter::default(),
            done: Family::default(),
            seconds: Family::new_with_constructor(|| Histogram::new(exponential_buckets(0.25, 2.0, 16))),
            running: Gauge::default(),
            queued: Gauge::default(),
        };
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

    pub(crate) fn ended(&self, entry: &Entry) {
        let record = &entry.record;
        let labels = Result {
            result: record.state.as_str(),
            reason: record.reason.map_or("", |reason| reason.as_str()),
        };
        self.done.get_or_create(&labels).inc();
        if let (Some(queued), Some(finished)) = (record.queued_at, record.finished_at) {
            self.seconds.get_or_create(&labels).observe(finished.duration_since(queued).as_secs_f64());
        }
    }
}
