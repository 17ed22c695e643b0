//! Plain HTTP on the port of the gRPC API, for curl and browsers: a build's log.

mod accept;
mod events;
mod log;
mod problem;
mod request;

use axum::Router;
use axum::extract::{Request, State};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use http::{HeaderValue, Method, StatusCode, header};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;
use tonic::service::Routes;

use crate::http::problem::Problem;
use crate::log::BuildLogs;

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Labels {
    method: &'static str,
    status: u16,
}

type Answered = Family<Labels, Counter>;

/// What is answered over HTTP, beside the gRPC services.
pub(crate) fn routes(grpc: Routes, logs: BuildLogs, metrics: &mut Registry) -> Routes {
    let answered = Answered::default();
    metrics.register("http_requests", "Requests for logs over HTTP, by method and status", answered.clone());
    let ours = Router::new()
        .route("/v1/builds/{id}/log", get(log::read).fallback(other_method))
        .with_state(logs)
        .layer(middleware::from_fn_with_state(answered, count));
    grpc.into_axum_router().fallback(unknown).merge(ours).into()
}

/// Of a log it is its begin that counts.
async fn count(State(answered): State<Answered>, request: Request, next: Next) -> Response {
    // Whatever a client calls its method: the set of labels stays bounded.
    let method = match *request.method() {
        Method::GET => "GET",
        Method::HEAD => "HEAD",
        _ => "other",
    };
    let answer = next.run(request).await;
    answered.get_or_create(&Labels { method, status: answer.status().as_u16() }).inc();
    answer
}

/// The router adds the header that says which methods there are.
async fn other_method(method: Method) -> Problem {
    let detail = format!("a log is read by GET or HEAD, not by {method}");
    Problem::new(StatusCode::METHOD_NOT_ALLOWED, "method-not-allowed", detail)
}

/// A gRPC client is answered in gRPC's words, all others in HTTP's.
async fn unknown(request: Request) -> Response {
    let kind = request.headers().get(header::CONTENT_TYPE).map(HeaderValue::as_bytes);
    if kind.is_some_and(|kind| kind.starts_with(b"application/grpc")) {
        return tonic::Status::unimplemented("no such service").into_http::<axum::body::Body>();
    }
    Problem::new(StatusCode::NOT_FOUND, "unknown-path", "nothing is here; a log is at /v1/builds/{id}/log")
        .into_response()
}
