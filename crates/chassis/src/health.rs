//! Whether a process lives, whether it can work, and its figures, over HTTP on listeners that the caller bound.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use serde_json::json;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::telemetry::Metrics;

/// A set of named checks that all must hold before the process may be asked. Clones share the set.
#[derive(Clone, Debug)]
pub struct Readiness {
    /// Check → why it does not hold.
    checks: Arc<watch::Sender<BTreeMap<String, Option<String>>>>,
}

impl Readiness {
    /// The checks that must be [`set`](Self::set) before the process is ready. Others may join later.
    pub fn new<'a>(names: impl IntoIterator<Item = &'a str>) -> Self {
        let checks =
            names.into_iter().map(|name| (name.to_owned(), Some("not started yet".to_owned()))).collect();
        Self { checks: Arc::new(watch::Sender::new(checks)) }
    }

    /// Says that a check holds, or why it doesn't.
    pub fn set(&self, name: &str, state: Result<(), String>) {
        let why_not = state.err();
        self.checks.send_if_modified(|checks| {
            if checks.get(name) == Some(&why_not) {
                return false;
            }
            checks.insert(name.to_owned(), why_not);
            true
        });
    }

    /// The checks that do not hold, each with the reason. Ready is: none.
    pub fn unmet(&self) -> BTreeMap<String, String> {
        unmet(&self.checks.borrow())
    }

    /// Returns once all checks hold at the same time.
    pub async fn ready(&self) {
        let mut checks = self.checks.subscribe();
        // An error would mean that the sender is gone: `self` holds it.
        let _ready = checks.wait_for(|checks| unmet(checks).is_empty()).await;
    }
}

fn unmet(checks: &BTreeMap<String, Option<String>>) -> BTreeMap<String, String> {
    checks.iter().filter_map(|(name, why)| Some((name.clone(), why.clone()?))).collect()
}

/// Answers `/live` (200 while the process can answer at all) and `/ready` (200, or 503 with what isn't ready as
/// JSON) until `stop`.
pub async fn serve_health(
    listener: TcpListener,
    readiness: Readiness,
    stop: CancellationToken,
) -> std::io::Result<()> {
    let router = Router::new()
        .route("/live", get(|| async { json_answer(StatusCode::OK, &json!({"live": true})) }))
        .route("/ready", get(ready))
        .with_state(readiness);
    axum::serve(listener, router).with_graceful_shutdown(stop.cancelled_owned()).await
}

async fn ready(State(readiness): State<Readiness>) -> Response {
    let unmet = readiness.unmet();
    let status = if unmet.is_empty() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    json_answer(status, &json!({"ready": unmet.is_empty(), "unmet": unmet}))
}

fn json_answer(status: StatusCode, body: &serde_json::Value) -> Response {
    (status, [(header::CONTENT_TYPE, "application/json")], format!("{body}\n")).into_response()
}

/// Answers `/metrics` in the OpenMetrics text format until `stop`.
pub async fn serve_metrics(
    listener: TcpListener,
    metrics: Metrics,
    stop: CancellationToken,
) -> std::io::Result<()> {
    let router = Router::new().route("/metrics", get(show)).with_state(metrics);
    axum::serve(listener, router).with_graceful_shutdown(stop.cancelled_owned()).await
}

async fn show(State(metrics): State<Metrics>) -> Response {
    match metrics.encode() {
        Ok(text) => {
            let content_type = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            (StatusCode::OK, [(header::CONTENT_TYPE, content_type)], text).into_response()
        }
        Err(error) => {
            tracing::error!("the metrics can't be written: {error}");
            (StatusCode::INTERNAL_SERVER_ERROR, "the metrics can't be written\n").into_response()
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;
    use tokio::task::JoinSet;

    use super::*;

    async fn get_text(address: std::net::SocketAddr, path: &str) -> String {
        let mut stream = TcpStream::connect(address).await.expect("connected");
        let question = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        stream.write_all(question.as_bytes()).await.expect("asked");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.expect("answered");
        answer
    }

    #[tokio::test]
    async fn ready_says_what_is_missing_and_follows_the_checks() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let address = listener.local_addr().expect("an address");
        let readiness = Readiness::new(["bus", "view"]);
        let stop = CancellationToken::new();
        let mut tasks = JoinSet::new();
        tasks.spawn(serve_health(listener, readiness.clone(), stop.clone()));

        assert!(get_text(address, "/live").await.starts_with("HTTP/1.1 200"));
        readiness.set("bus", Ok(()));
        let answer = get_text(address, "/ready").await;
        assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
        assert!(answer.ends_with("{\"ready\":false,\"unmet\":{\"view\":\"not started yet\"}}\n"), "{answer}");

        readiness.set("view", Ok(()));
        readiness.ready().await;
        assert!(get_text(address, "/ready").await.starts_with("HTTP/1.1 200"));
        readiness.set("bus", Err("disconnected".into()));
        assert!(get_text(address, "/ready").await.contains("\"bus\":\"disconnected\""));

        stop.cancel();
        tasks.join_next().await.expect("a task").expect("no panic").expect("no error");
    }

    #[tokio::test]
    async fn metrics_are_openmetrics_text() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let address = listener.local_addr().expect("an address");
        let metrics = Metrics::new("1.2.3");
        let mut part = Metrics::part("log-relay");
        let lines = prometheus_client::metrics::counter::Counter::<u64>::default();
        part.register("lines", "Lines", lines.clone());
        metrics.add(part);
        lines.inc();
        let stop = CancellationToken::new();
        let mut tasks = JoinSet::new();
        tasks.spawn(serve_metrics(listener, metrics, stop.clone()));
        let answer = get_text(address, "/metrics").await;
        assert!(answer.contains("content-type: application/openmetrics-text"), "{answer}");
        assert!(answer.contains("kiln_build_info{version=\"1.2.3\"} 1"), "{answer}");
        assert!(answer.contains("kiln_log_relay_lines_total 1"), "{answer}");
        assert!(answer.ends_with("# EOF\n"), "{answer}");
        stop.cancel();
        tasks.join_next().await.expect("a task").expect("no panic").expect("no error");
    }
}
