//! What every call has: a span that continues the caller's trace, and a count by code.

use std::future::Future;
use std::time::Duration;

use opentelemetry::global;
use opentelemetry::propagation::Extractor;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use tonic::metadata::{KeyRef, MetadataMap};
use tonic::{Request, Response, Status};
use tracing::Instrument as _;
use tracing_opentelemetry::OpenTelemetrySpanExt as _;

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Labels {
    method: &'static str,
    code: String,
}

#[derive(Clone)]
pub(crate) struct Metrics {
    handled: Family<Labels, Counter>,
    seconds: Family<Labels, Histogram, fn() -> Histogram>,
}

impl Metrics {
    pub(crate) fn register(registry: &mut Registry) -> Self {
        let metrics = Self {
            handled: Family::default(),
            seconds: Family::new_with_constructor(|| {
                Histogram::new([0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 30.0])
            }),
        };
        registry.register("rpcs_handled", "Calls answered, by method and gRPC code", metrics.handled.clone());
        registry.register(
            "rpc_seconds",
            "Time to the answer of a call, or to a stream's begin",
            metrics.seconds.clone(),
        );
        metrics
    }

    /// Runs a call's handler in its span and counts how it ended. Of a stream it is the begin that counts.
    pub(crate) async fn call<T, R, Fut>(
        &self,
        method: &'static str,
        request: Request<T>,
        handler: impl FnOnce(T) -> Fut,
    ) -> Result<Response<R>, Status>
    where
        Fut: Future<Output = Result<R, Status>>,
    {
        let span = tracing::info_span!("rpc", method);
        let context = global::get_text_map_propagator(|p| p.extract(&Metadata(request.metadata())));
        // Fails only where no OpenTelemetry layer is installed: then there is no trace to continue.
        let _ = span.set_parent(context);
        let begun = tokio::time::Instant::now();
        let answer = handler(request.into_inner()).instrument(span).await;
        self.observe(method, answer.as_ref().err(), begun.elapsed());
        answer.map(Response::new)
    }

    fn observe(&self, method: &'static str, error: Option<&Status>, took: Duration) {
        let code = error.map_or(tonic::Code::Ok, Status::code);
        let labels = Labels { method, code: format!("{code:?}") };
        self.handled.get_or_create(&labels).inc();
        self.seconds.get_or_create(&labels).observe(took.as_secs_f64());
    }
}

struct Metadata<'a>(&'a MetadataMap);

impl Extractor for Metadata<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key).and_then(|value| value.to_str().ok())
    }

    fn keys(&self) -> Vec<&str> {
        self.0
            .keys()
            .filter_map(|key| match key {
                KeyRef::Ascii(key) => Some(key.as_str()),
                KeyRef::Binary(_) => None,
            })
            .collect()
    }
}
