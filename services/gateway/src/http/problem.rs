//! Errors as HTTP's: the one place where they are mapped. Their form is RFC 9457's.

use axum::response::{IntoResponse, Response};
use http::{HeaderValue, StatusCode, header};
use kiln_bus::BusError;
use kiln_bus::logs::LogError;
use serde_json::json;

use crate::cut::Cut;
use crate::log::ReadError;

/// An answer that is none.
#[derive(Debug)]
pub(crate) struct Problem {
    status: StatusCode,
    /// A word that a program may rely on.
    reason: &'static str,
    detail: String,
    /// The log's length, where a range lies outside of it.
    length: Option<u64>,
}

impl Problem {
    pub(crate) fn new(status: StatusCode, reason: &'static str, detail: impl Into<String>) -> Self {
        Self { status, reason, detail: detail.into(), length: None }
    }

    /// The request is wrong: `what` names the part of it.
    pub(crate) fn invalid(what: &str, problem: impl std::fmt::Display) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid-request", format!("{what}: {problem}"))
    }

    /// No byte of the range is there, of a log that is `length` bytes long.
    pub(crate) fn unsatisfiable(detail: impl Into<String>, length: u64) -> Self {
        let problem = Self::new(StatusCode::RANGE_NOT_SATISFIABLE, "out-of-range", detail);
        Self { length: Some(length), ..problem }
    }
}

impl From<ReadError> for Problem {
    fn from(error: ReadError) -> Self {
        let (status, reason) = match &error {
            ReadError::UnknownBuild { .. } => (StatusCode::NOT_FOUND, "unknown-build"),
            ReadError::NotBegun { .. } => (StatusCode::NOT_FOUND, "log-not-begun"),
            ReadError::Expired { .. } => (StatusCode::NOT_FOUND, "log-expired"),
            ReadError::Log(LogError::Discarded { .. } | LogError::Beyond { .. }) => {
                (StatusCode::RANGE_NOT_SATISFIABLE, "out-of-range")
            }
            ReadError::Bus(BusError::Unavailable { .. })
            | ReadError::Log(LogError::Bus(BusError::Unavailable { .. }))
            | ReadError::Cut(Cut::Stopping | Cut::BusAway(_)) => {
                (StatusCode::SERVICE_UNAVAILABLE, "unavailable")
            }
            ReadError::Cut(Cut::Lost(_)) => (StatusCode::GONE, "lost-build"),
            ReadError::Bus(_) | ReadError::Log(_) => (StatusCode::INTERNAL_SERVER_ERROR, "internal"),
        };
        let length = match error {
            ReadError::Log(LogError::Beyond { end, .. }) => Some(end),
            _ => None,
        };
        Self { length, ..Self::new(status, reason, error.to_string()) }
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let body = json!({
            "title": self.status.canonical_reason(),
            "status": self.status.as_u16(),
            "reason": self.reason,
            "detail": self.detail,
        });
        let mut answer = (self.status, format!("{body}\n")).into_response();
        let headers = answer.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        if self.status == StatusCode::SERVICE_UNAVAILABLE {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(1));
        }
        if let Some(length) = self.length
            && let Ok(value) = format!("bytes */{length}").parse()
        {
            headers.insert(header::CONTENT_RANGE, value);
        }
        answer
    }
}
