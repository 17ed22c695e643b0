//! What a log-relay counts.

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

/// The log-relay's metrics; clones share them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Metrics {
    writing: Gauge,
    pub(crate) bytes: Counter,
    pub(crate) chunks: Counter,
    pub(crate) completed: Counter,
    pub(crate) taken_over: Counter,
    pub(crate) withheld: Counter,
    pub(crate) limited: Counter,
    pub(crate) emptied: Counter,
    pub(crate) unfinished: Counter,
}

/// A log that this relay writes, until it is dropped: also where its task is aborted.
pub(crate) struct Writing(Gauge);

impl Drop for Writing {
    fn drop(&mut self) {
        self.0.dec();
    }
}

impl Metrics {
    /// `max_log_bytes` is the setting, which is shown beside what is counted.
    pub(crate) fn register(registry: &mut Registry, max_log_bytes: u64) -> Self {
        let metrics = Self::default();
        let limit = Gauge::<i64>::default();
        limit.set(i64::try_from(max_log_bytes).unwrap_or(i64::MAX));
        registry.register("max_log_bytes", "Bytes that the log of one build may have", limit);
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
        metrics
    }

    /// Counts a log as written as long as what is returned lives.
    pub(crate) fn writing(&self) -> Writing {
        self.writing.inc();
        Writing(self.writing.clone())
    }
}
