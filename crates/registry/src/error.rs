//! What can be wrong with an image or its registry, told from the HTTP status and the registry's own error code.

use std::error::Error as StdError;
use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, StatusCode, header};
use kiln_domain::limits::truncated;
use kiln_domain::platform::Platform;
use serde::Deserialize;

/// Why a registry could not do what it was asked. Each names what it was asked about; none holds a secret.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// No such repository, tag, manifest or blob.
    #[error("{reference} does not exist")]
    NotFound { reference: String },
    /// No credentials, or wrong ones.
    #[error("{reference} needs other credentials: {problem}")]
    Unauthenticated { reference: String, problem: String },
    /// The credentials do not reach so far.
    #[error("access to {reference} is denied: {problem}")]
    Denied { reference: String, problem: String },
    /// Too many requests, by the registry's count.
    #[error("registry {registry} limits requests{}", again_after(.retry_after))]
    Limited { registry: String, retry_after: Option<Duration> },
    /// Cannot be asked just now.
    #[error("registry {registry} cannot be asked: {problem}{}", again_after(.retry_after))]
    Unavailable { registry: String, problem: Problem, retry_after: Option<Duration> },
    /// The name service knows no such host.
    #[error("registry host {registry} does not exist")]
    UnknownHost { registry: String },
    /// The image exists, for other platforms. `offered` lists them, as `os/architecture[/variant]`.
    #[error("no manifest for platform {} found in {reference}{}", dashed(.platform), listed(.offered))]
    NoPlatform { reference: String, platform: Platform, offered: Vec<String> },
    /// The registry gave something that cannot be the image.
    #[error("{reference} is broken in its registry: {problem}")]
    Broken { reference: String, problem: String },
    /// Valid, but of a kind that Kiln does not do.
    #[error("{reference} is not supported: {problem}")]
    Unsupported { reference: String, problem: String },
    /// The registry does not accept the request, for a reason of its own.
    #[error("the registry refuses {reference} (HTTP {status}): {problem}")]
    Rejected { reference: String, status: u16, problem: String },
    /// The caller's `before_put` said no.
    #[error("stopped before the manifest was put")]
    Stopped(#[source] Arc<io::Error>),
}

/// Why a registry cannot be asked.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Problem {
    /// Nobody listens there.
    Refused,
    /// It did not answer in time.
    Timeout,
    /// It answered with a server error.
    Status(u16),
    /// No TLS connection can be made that is to be trusted; trying again is of no use.
    Tls(String),
    /// The connection was lost, or could not be made.
    Connection(String),
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused => f.write_str("connection refused"),
            Self::Timeout => f.write_str("no answer in time"),
            Self::Status(status) => write!(f, "it answered HTTP {status}"),
            Self::Tls(problem) => write!(f, "TLS: {problem}"),
            Self::Connection(problem) => f.write_str(problem),
        }
    }
}

impl Error {
    /// Whether who asked can mend it (another reference, platform or credential); else it is the registry's
    /// trouble, or ours.
    pub fn is_users(&self) -> bool {
        match self {
            Self::NotFound { .. }
            | Self::Unauthenticated { .. }
            | Self::Denied { .. }
            | Self::UnknownHost { .. }
            | Self::NoPlatform { .. }
            | Self::Unsupported { .. } => true,
            Self::Limited { .. }
            | Self::Unavailable { .. }
            | Self::Broken { .. }
            | Self::Rejected { .. }
            | Self::Stopped(_) => false,
        }
    }

    /// The registry that it happened at (`docker.io`, `host[:port]`): of a copy, this tells source from target.
    pub fn registry(&self) -> Option<&str> {
        match self {
            Self::Limited { registry, .. }
            | Self::Unavailable { registry, .. }
            | Self::UnknownHost { registry } => Some(registry),
            Self::NotFound { reference }
            | Self::Unauthenticated { reference, .. }
            | Self::Denied { reference, .. }
            | Self::NoPlatform { reference, .. }
            | Self::Broken { reference, .. }
            | Self::Unsupported { reference, .. }
            | Self::Rejected { reference, .. } => reference.split('/').next(),
            Self::Stopped(_) => None,
        }
    }

    /// How long the registry asked not to be asked again.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Limited { retry_after, .. } | Self::Unavailable { retry_after, .. } => *retry_after,
            _ => None,
        }
    }

    pub(crate) fn unavailable(registry: &str, problem: Problem) -> Self {
        Self::Unavailable { registry: registry.to_owned(), problem, retry_after: None }
    }

    pub(crate) fn broken(reference: &str, problem: impl Into<String>) -> Self {
        Self::Broken { reference: reference.to_owned(), problem: problem.into() }
    }

    /// From a request that got no (whole) answer. The URL is left out: it may bear a signature.
    pub(crate) fn from_transport(error: &reqwest::Error, registry: &str) -> Self {
        let registry = registry.to_owned();
        if error.is_timeout() {
            return Self::Unavailable { registry, problem: Problem::Timeout, retry_after: None };
        }
        let innermost = chain(error).skip(1).last();
        let text = innermost.map_or_else(|| "the request could not be sent".to_owned(), ToString::to_string);
        // The resolver's own errors have no kind; "try again" (EAI_AGAIN) does not say that there is no such host.
        let passing =
            ["temporary failure", "try again"].iter().any(|t| text.to_ascii_lowercase().contains(t));
        if error.is_dns() && !passing {
            return Self::UnknownHost { registry };
        }
        let refused = |error: &io::Error| error.kind() == io::ErrorKind::ConnectionRefused;
        let problem = if chain(error).any(|error| error.downcast_ref().is_some_and(refused)) {
            Problem::Refused
        } else if chain(error).any(|error| error.is::<rustls::Error>()) {
            Problem::Tls(text)
        } else {
            Problem::Connection(text)
        };
        Self::Unavailable { registry, problem, retry_after: None }
    }

    /// From an answer that is no success. `body` is what could be read of it.
    pub(crate) fn from_answer(
        status: StatusCode,
        headers: &HeaderMap,
        body: &Bytes,
        reference: &str,
        registry: &str,
    ) -> Self {
        let (reference, registry) = (reference.to_owned(), registry.to_owned());
        let (code, problem) = said(body, status);
        let retry_after = retry_after(headers);
        match (status.as_u16(), code.as_str()) {
            (429, _) | (400..=499, "TOOMANYREQUESTS") => Self::Limited { registry, retry_after },
            (401, "DENIED") | (403, _) => Self::Denied { reference, problem },
            (401, _) => Self::Unauthenticated { reference, problem },
            (400..=499, "MANIFEST_BLOB_UNKNOWN") => {
                Self::Rejected { reference, status: status.as_u16(), problem }
            }
            (404, _) | (400, "NAME_UNKNOWN" | "MANIFEST_UNKNOWN" | "BLOB_UNKNOWN") => {
                Self::NotFound { reference }
            }
            (408 | 500..=599, _) => {
                Self::Unavailable { registry, problem: Problem::Status(status.as_u16()), retry_after }
            }
            _ => Self::Rejected { reference, status: status.as_u16(), problem },
        }
    }
}

/// The error body of the distribution spec, "Error codes".
#[derive(Deserialize)]
struct Errors {
    errors: Vec<Said>,
}

#[derive(Deserialize)]
struct Said {
    #[serde(default)]
    code: String,
    #[serde(default)]
    message: String,
}

/// The registry's code and its sentence, cut to a length fit for a message.
fn said(body: &[u8], status: StatusCode) -> (String, String) {
    let first = serde_json::from_slice::<Errors>(body).ok().and_then(|body| body.errors.into_iter().next());
    let Said { code, message } = first.unwrap_or(Said { code: String::new(), message: String::new() });
    let message = message.chars().filter(|c| !c.is_control()).collect::<String>();
    let message = if message.is_empty() {
        status.canonical_reason().unwrap_or("no reason given").to_lowercase()
    } else {
        truncated(message, 300)
    };
    (code, message)
}

/// Retry-After in either of its forms; a date is read against the answer's own Date, not against our clock.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    const LONGEST: Duration = Duration::from_secs(24 * 3600);
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok()).map(str::trim);
    let value = text(header::RETRY_AFTER)?;
    if let Ok(seconds) = value.parse() {
        return Some(Duration::from_secs(seconds).min(LONGEST));
    }
    let date = |text: &str| jiff::fmt::rfc2822::DateTimeParser::new().parse_timestamp(text).ok();
    let (then, now) = (date(value)?, date(text(header::DATE)?)?);
    Some(Duration::try_from(then.duration_since(now)).unwrap_or_default().min(LONGEST))
}

/// The error and its causes, outermost first. An `io::Error` hides what it wraps from `source`.
fn chain<'a>(error: &'a (dyn StdError + 'static)) -> impl Iterator<Item = &'a (dyn StdError + 'static)> {
    std::iter::successors(Some(error), |error| {
        match error.downcast_ref::<io::Error>().and_then(io::Error::get_ref) {
            Some(inside) => Some(inside as &(dyn StdError + 'static)),
            None => (*error).source(),
        }
    })
}

fn again_after(retry_after: &Option<Duration>) -> String {
    retry_after.map_or_else(String::new, |time| format!(", again in {} s", time.as_secs()))
}

fn dashed(platform: &Platform) -> String {
    platform.to_string().replace('/', "-")
}

fn listed(offered: &[String]) -> String {
    if offered.is_empty() { String::new() } else { format!(" (it has {})", offered.join(", ")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(status: u16, headers: &[(header::HeaderName, &str)], body: &str) -> Error {
        let headers = headers.iter().map(|(name, value)| (name.clone(), value.parse().unwrap())).collect();
        let body = Bytes::copy_from_slice(body.as_bytes());
        Error::from_answer(StatusCode::from_u16(status).unwrap(), &headers, &body, "r.io/a:1", "r.io")
    }

    #[test]
    fn status_and_code_make_the_case() {
        for (status, code, expected) in [
            (401, "UNAUTHORIZED", "r.io/a:1 needs other credentials: said"),
            (401, "DENIED", "access to r.io/a:1 is denied: said"),
            (403, "", "access to r.io/a:1 is denied: said"),
            (404, "NAME_UNKNOWN", "r.io/a:1 does not exist"),
            (400, "MANIFEST_UNKNOWN", "r.io/a:1 does not exist"),
            (404, "MANIFEST_BLOB_UNKNOWN", "the registry refuses r.io/a:1 (HTTP 404): said"),
            (403, "TOOMANYREQUESTS", "registry r.io limits requests"),
            (429, "", "registry r.io limits requests"),
            (503, "", "registry r.io cannot be asked: it answered HTTP 503"),
            (405, "UNSUPPORTED", "the registry refuses r.io/a:1 (HTTP 405): said"),
        ] {
            let body = format!(r#"{{"errors":[{{"code":"{code}","message":"said"}}]}}"#);
            assert_eq!(answer(status, &[], &body).to_string(), expected);
            assert_eq!(answer(status, &[], &body).registry(), Some("r.io"));
        }
        assert!(answer(403, &[], "<html>").to_string().ends_with("is denied: forbidden"));
    }

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        let date = (header::DATE, "Wed, 21 Oct 2015 07:27:30 GMT");
        for (value, expected) in [
            ("7", Some(7)),
            (" 99999999999 ", Some(24 * 3600)),
            ("Wed, 21 Oct 2015 07:28:00 GMT", Some(30)),
            ("Wed, 21 Oct 2015 07:20:00 GMT", Some(0)),
            ("soon", None),
            ("-1", None),
        ] {
            let error = answer(429, &[date.clone(), (header::RETRY_AFTER, value)], "");
            assert_eq!(error.retry_after(), expected.map(Duration::from_secs), "{value}");
        }
    }
}
