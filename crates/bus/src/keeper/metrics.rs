//! What the keeper shows: troubles while they last, and sizes.

use async_nats::jetstream::stream::Info;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use crate::trouble::Trouble;

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct StreamLabels {
    stream: String,
}

#[derive(Clone, Default)]
pub(super) struct Metrics {
    pub(super) trouble: Family<Trouble, Gauge>,
    pub(super) troubles: Family<Trouble, Counter>,
    bytes: Family<StreamLabels, Gauge>,
    limit: Family<StreamLabels, Gauge>,
    pub(super) mirror_lag: Gauge,
    max_age: Family<StreamLabels, Gauge>,
    subjects: Family<StreamLabels, Gauge>,
}

impl Metrics {
    pub(super) fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register("trouble", "1 while a part of the bus is in trouble", metrics.trouble.clone());
        registry.register("troubles", "Troubles of the bus that began", metrics.troubles.clone());
        registry.register("stream_bytes", "Bytes that a stream holds", metrics.bytes.clone());
        registry.register("stream_limit_bytes", "Bytes that a stream may hold", metrics.limit.clone());
        registry.register(
            "mirror_lag",
            "Events of the journal that KILN_EVENTS does not have yet",
            metrics.mirror_lag.clone(),
        );
        registry.register(
            "stream_max_age_seconds",
            "The age at which a message is removed",
            metrics.max_age.clone(),
        );
        registry.register(
            "stream_subjects",
            "Subjects of which a stream holds a message: of the log stream, the builds with a log",
            metrics.subjects.clone(),
        );
        metrics
    }

    pub(super) fn size(&self, info: &Info) {
        let labels = StreamLabels { stream: info.config.name.clone() };
        let shown = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
        self.bytes.get_or_create(&labels).set(shown(info.state.bytes));
        self.subjects.get_or_create(&labels).set(shown(info.state.subjects_count));
        if info.config.max_bytes > 0 {
            self.limit.get_or_create(&labels).set(info.config.max_bytes);
        }
        if !info.config.max_age.is_zero() {
            self.max_age.get_or_create(&labels).set(shown(info.config.max_age.as_secs()));
        }
    }
}
