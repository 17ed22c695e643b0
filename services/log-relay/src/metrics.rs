//! What a log-relay counts.

use kiln_bus::logs::Kept;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

/// The log-relay's metrics; clones share them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Metrics {
    pub(crate) writing: Gauge,
    pub(crate) bytes: Counter,
    pub(crate) chunks: Counter,
    pub(crate) completed: Counter,
    pub(crate) taken_over: Counter,
    pub(crate) withheld: Counter,
    pub(crate) limited: Counter,
    pub(crate) emptied: Counter,
    pub(crate) unfinished: Counter,
    pub(crate) kept_bytes: Gauge,
    pub(crate) max_bytes: Gauge,
    pub(crate) max_age_seconds: Gauge,
    pub(crate) kept_logs: Gauge,
}

impl Metrics {
    pub(crate) fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register("logs_writing", "Logs that this relay writes now", metrics.writing.clone());
        registry.register("log_bytes", "Bytes appended to logs", metrics.bytes.clone());
        registry.register("log_chunks", "Messages appended to logs", metrics.chunks.clone());
        registry.register("logs_completed", "Logs completed", metrics.completed.clone());
        registry.register(
            "logs_taken_over",
            "Logs gone on with after another relay",
            metrics.taken_over.clone(),
        );
        registry.register(
            "logs_withheld",
            "Logs withheld, as secrets could not be opened",
            metrics.withheld.clone(),
        );
        registry.register("logs_limited", "Logs that reached their size limit", metrics.limited.clone());
        registry.register(
            "logs_emptied",
            "Logs whose stored bytes were gone before their end",
            metrics.emptied.clone(),
        );
        registry.register(
            "logs_unfinished",
            "Outputs whose end could not be read",
            metrics.unfinished.clone(),
        );
        registry.register(
            "stream_bytes",
            "Bytes that the stream of all logs takes",
            metrics.kept_bytes.clone(),
        );
        registry.register(
            "stream_max_bytes",
            "Bytes at which the stream drops what is oldest",
            metrics.max_bytes.clone(),
        );
        registry.register(
            "stream_max_age_seconds",
            "The age at which a byte of a log is removed",
            metrics.max_age_seconds.clone(),
        );
        registry.register("stream_logs", "Builds of which the stream has a log", metrics.kept_logs.clone());
        metrics
    }

    pub(crate) fn keep(&self, kept: Kept) {
        let shown = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
        self.kept_bytes.set(shown(kept.bytes));
        self.max_bytes.set(shown(kept.max_bytes));
        self.max_age_seconds.set(shown(kept.max_age.as_secs()));
        self.kept_logs.set(shown(kept.logs));
    }
}
