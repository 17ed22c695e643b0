//! The HTTP underneath: which client and which scheme a registry is asked by, redirects, bodies with a bound.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::{HeaderValue, Method, header};
use kiln_domain::limits;
use kiln_domain::registries::Registries;
use reqwest::{Request, Response};
use url::Url;

use crate::error::{Error, Problem};
use crate::trust::{Clients, HUB, HUB_ON_THE_WIRE};

/// Most of any body that is held in memory: manifests, configs, tokens.
pub(crate) const BODY_BYTES: usize = 4 << 20;
/// Most of an error's body that is looked at.
const ERROR_BYTES: usize = 64 << 10;
const REDIRECTS: usize = 5;

/// How registries are spoken to.
#[derive(Clone, Debug)]
pub struct Config {
    /// Which are spoken to without TLS, and whom the others are trusted by. Mirrors are the caller's business.
    pub registries: Registries,
    /// On whose behalf they are asked, as a registry's log is to show it (`run …`): a comment in `User-Agent`.
    pub on_behalf_of: Option<String>,
    /// How long one request may take, its (bounded) answer included.
    pub request_timeout: Duration,
    /// How long a blob's transfer may stand still; a registry that checks what it was given stands still, too.
    pub stall_timeout: Duration,
    /// How many blobs of an image are copied at once.
    pub parallel_blobs: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            registries: Registries::default(),
            on_behalf_of: None,
            request_timeout: limits::REGISTRY_REQUEST,
            stall_timeout: Duration::from_secs(120),
            parallel_blobs: 3,
        }
    }
}

/// The HTTP clients, each made when it is first needed; by the environment's proxies.
#[derive(Debug)]
pub(crate) struct Http {
    pub(crate) config: Config,
    clients: Clients,
    user_agent: HeaderValue,
}

impl Http {
    pub(crate) fn new(config: Config) -> Self {
        let user_agent = user_agent(config.on_behalf_of.as_deref());
        Self { config, clients: Clients::default(), user_agent }
    }

    /// `http(s)://host/v2/`, where a registry is on the wire.
    pub(crate) fn base(&self, registry: &str) -> Result<Url, Error> {
        let host = if registry == HUB { HUB_ON_THE_WIRE } else { registry };
        let scheme = if self.config.registries.is_plain(registry) { "http" } else { "https" };
        // No URL: a port above 65535, say.
        let unknown = |_| Error::UnknownHost { registry: registry.to_owned() };
        Url::parse(&format!("{scheme}://{host}/v2/")).map_err(unknown)
    }

    /// Sends a request as it is. GET and HEAD are redirected, without what identifies the caller; never from TLS
    /// to plain HTTP. An answer of whatever status is a success here.
    pub(crate) async fn send(
        &self,
        request: Request,
        reference: &str,
        registry: &str,
    ) -> Result<Response, Error> {
        let method = request.method().clone();
        let accept = request.headers().get(header::ACCEPT).cloned();
        let mut answer = self.execute(request, registry).await?;
        for _ in 0..REDIRECTS {
            let redirected =
                answer.status().is_redirection() && (method == Method::GET || method == Method::HEAD);
            let Some(location) = answer.headers().get(header::LOCATION).filter(|_| redirected) else {
                return Ok(answer);
            };
            let url = location.to_str().ok().and_then(|location| answer.url().join(location).ok());
            let url = url.ok_or_else(|| Error::broken(reference, "it is redirected to what is no URL"))?;
            same_security(answer.url(), &url)
                .map_err(|problem| Error::broken(reference, format!("it is redirected to {problem}")))?;
            let mut next = Request::new(method.clone(), url);
            if let Some(accept) = &accept {
                next.headers_mut().insert(header::ACCEPT, accept.clone());
            }
            answer = self.execute(next, registry).await?;
        }
        Err(Error::broken(reference, format!("it is redirected more than {REDIRECTS} times")))
    }

    /// Sends a request as it is, and follows no redirect.
    pub(crate) async fn execute(&self, mut request: Request, registry: &str) -> Result<Response, Error> {
        let client = self.clients.client(&self.config.registries, registry, request.url());
        let client = client.map_err(|problem| Error::unavailable(registry, Problem::Tls(problem)))?;
        request.headers_mut().insert(header::USER_AGENT, self.user_agent.clone());
        client.execute(request).await.map_err(|error| Error::from_transport(&error, registry))
    }
}

impl Default for Http {
    fn default() -> Self {
        Self::new(Config::default())
    }
}

/// A product and, in parentheses, a comment (RFC 9110, section 10.1.5). What is no header is left out.
fn user_agent(on_behalf_of: Option<&str>) -> HeaderValue {
    const KILN: &str = concat!("kiln/", env!("CARGO_PKG_VERSION"));
    let told = on_behalf_of.and_then(|who| HeaderValue::try_from(format!("{KILN} ({who})")).ok());
    told.unwrap_or(HeaderValue::from_static(KILN))
}

/// Whether what was begun at `from` may go on at `to`; else what is wrong with `to`, without its path and query.
pub(crate) fn same_security(from: &Url, to: &Url) -> Result<(), String> {
    match to.scheme() {
        "https" => Ok(()),
        "http" if from.scheme() == "http" => Ok(()),
        other => Err(format!("{other}://{}, away from TLS", to.host_str().unwrap_or_default())),
    }
}

/// An answer's whole body, if it has no more than [`BODY_BYTES`].
pub(crate) async fn body(answer: Response, reference: &str, registry: &str) -> Result<Bytes, Error> {
    let (body, whole) = read(answer, BODY_BYTES).await.map_err(|e| Error::from_transport(&e, registry))?;
    if whole { Ok(body) } else { Err(Error::broken(reference, "it is larger than 4 MiB")) }
}

/// The answer itself if it is a success; else what it says is wrong.
pub(crate) async fn successful(answer: Response, reference: &str, registry: &str) -> Result<Response, Error> {
    if answer.status().is_success() {
        return Ok(answer);
    }
    let (status, headers) = (answer.status(), answer.headers().clone());
    // Without its body, if that can't be had, an answer still has its status.
    let said = read(answer, ERROR_BYTES).await.map(|(body, _)| body).unwrap_or_default();
    Err(Error::from_answer(status, &headers, &said, reference, registry))
}

/// At most `limit` bytes, and whether that is all.
async fn read(mut answer: Response, limit: usize) -> Result<(Bytes, bool), reqwest::Error> {
    let mut body = BytesMut::new();
    while let Some(piece) = answer.chunk().await? {
        if body.len() + piece.len() > limit {
            return Ok((body.freeze(), false));
        }
        body.extend_from_slice(&piece);
    }
    Ok((body.freeze(), true))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_a_registry_is_on_the_wire() {
        let mut registries = Registries::default();
        registries.plain(["plain.test".into(), "other.test:5000".into()]);
        let http = Http::new(Config { registries, ..Config::default() });
        for (registry, url) in [
            ("docker.io", "https://registry-1.docker.io/v2/"),
            ("ghcr.io", "https://ghcr.io/v2/"),
            ("127.0.0.1:5000", "http://127.0.0.1:5000/v2/"),
            ("127.9.9.9:443", "http://127.9.9.9:443/v2/"),
            ("localhost", "http://localhost/v2/"),
            ("[::1]:5000", "http://[::1]:5000/v2/"),
            ("localhost.evil.test", "https://localhost.evil.test/v2/"),
            ("plain.test:8080", "http://plain.test:8080/v2/"),
            ("other.test:5000", "http://other.test:5000/v2/"),
            ("other.test", "https://other.test/v2/"),
        ] {
            assert_eq!(http.base(registry).unwrap().as_str(), url);
        }
        assert!(matches!(http.base("a.test:99999"), Err(Error::UnknownHost { .. })));
    }
}
