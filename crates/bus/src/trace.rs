//! W3C trace context on messages, by the process's text-map propagator.

use async_nats::HeaderMap;
use opentelemetry::global;
use opentelemetry::propagation::{Extractor, Injector};
use tracing_opentelemetry::OpenTelemetrySpanExt as _;

struct Carrier<'a>(&'a mut HeaderMap);

impl Injector for Carrier<'_> {
    fn set(&mut self, key: &str, value: String) {
        self.0.insert(key, value.as_str());
    }
}

struct Headers<'a>(&'a HeaderMap);

impl Extractor for Headers<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key).map(async_nats::HeaderValue::as_str)
    }

    fn keys(&self) -> Vec<&str> {
        self.0.iter().map(|(name, _)| name.as_ref()).collect()
    }
}

/// Writes the current span's context into a message's headers.
pub(crate) fn inject(headers: &mut HeaderMap) {
    let context = tracing::Span::current().context();
    global::get_text_map_propagator(|propagator| propagator.inject_context(&context, &mut Carrier(headers)));
}

/// Makes `span` a child of the context in a message's headers.
pub(crate) fn adopt(span: &tracing::Span, headers: Option<&HeaderMap>) {
    if let Some(headers) = headers {
        let context = global::get_text_map_propagator(|propagator| propagator.extract(&Headers(headers)));
        // Fails only where no OpenTelemetry layer is installed: then there is no trace to continue.
        let _ = span.set_parent(context);
    }
}

/// Makes `span` a child of the context that a record's `traceparent` names.
pub fn continue_from(span: &tracing::Span, traceparent: &str) {
    let mut headers = HeaderMap::new();
    headers.insert(kiln_contract::header::TRACEPARENT, traceparent);
    adopt(span, Some(&headers));
}

/// The current span's context as a `traceparent`; empty where there is none.
pub fn current_traceparent() -> String {
    let mut headers = HeaderMap::new();
    inject(&mut headers);
    headers.get(kiln_contract::header::TRACEPARENT).map(ToString::to_string).unwrap_or_default()
}
