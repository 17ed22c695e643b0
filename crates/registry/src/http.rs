//! The HTTP underneath: which client and which scheme a registry is asked by, redirects, bodies with a bound.

use std::sync::OnceLock;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::{Method, header};
use reqwest::{Client, Request, Response, redirect};
use url::{Host, Url};

use crate::error::{Error, Problem};

/// Most of any body that is held in memory: manifests, configs, tokens.
pub(crate) const BODY_BYTES: usize = 4 << 20;
/// Most of an error's body that is looked at.
const ERROR_BYTES: usize = 64 << 10;
const REDIRECTS: usize = 5;
const CONNECT: Duration = Duration::from_secs(10);

/// How registries are spoken to.
#[derive(Clone, Debug)]
pub struct Config {
    /// Registries (`host`, for all its ports, or `host:port`) that are spoken to without TLS.
    pub plain_http: Vec<String>,
    /// Whether 127.0.0.0/8, `localhost` and `[::1]` are spoken to without TLS.
    pub plain_loopback: bool,
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
            plain_http: Vec::new(),
            plain_loopback: true,
            request_timeout: Duration::from_secs(30),
            stall_timeout: Duration::from_secs(120),
            parallel_blobs: 3,
        }
    }
}

/// The HTTP clients, each made when it is first needed.
#[derive(Debug, Default)]
pub(crate) struct Http {
    pub(crate) config: Config,
    /// For loopback without TLS: no proxy, no trust roots.
    near: OnceLock<Result<Client, String>>,
    /// For everything else, by the environment's proxies and the system's trust roots.
    far: OnceLock<Result<Client, String>>,
}

impl Http {
    pub(crate) fn new(config: Config) -> Self {
        Self { config, ..Self::default() }
    }

    /// `http(s)://host/v2/`, where a registry is on the wire.
    pub(crate) fn base(&self, registry: &str) -> Result<Url, Error> {
        let host = if registry == "docker.io" { "registry-1.docker.io" } else { registry };
        // No URL: a port above 65535, say.
        let unknown = |_| Error::UnknownHost { registry: registry.to_owned() };
        let mut url = Url::parse(&format!("https://{host}/v2/")).map_err(unknown)?;
        let bare = host.rsplit_once(':').map_or(host, |(bare, _)| bare);
        let named = self.config.plain_http.iter().any(|plain| plain == host || plain == bare);
        if named || (self.config.plain_loopback && is_loopback(&url)) {
            // Parsed anew, as the port may be TLS's default, which a parsed URL doesn't keep.
            url = Url::parse(&format!("http://{host}/v2/")).map_err(unknown)?;
        }
        Ok(url)
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
    pub(crate) async fn execute(&self, request: Request, registry: &str) -> Result<Response, Error> {
        let client = self.client(request.url()).map_err(|problem| Error::unavailable(registry, problem))?;
        client.execute(request).await.map_err(|error| Error::from_transport(&error, registry))
    }

    fn client(&self, url: &Url) -> Result<&Client, Problem> {
        let made = if url.scheme() == "http" && is_loopback(url) {
            self.near.get_or_init(|| make(|builder| builder.no_proxy().tls_certs_only([])))
        } else {
            self.far.get_or_init(|| make(|builder| builder))
        };
        made.as_ref().map_err(|problem| Problem::Tls(problem.clone()))
    }
}

fn make(adjust: impl FnOnce(reqwest::ClientBuilder) -> reqwest::ClientBuilder) -> Result<Client, String> {
    crate::install_crypto_provider();
    let builder = Client::builder()
        .user_agent(concat!("kiln/", env!("CARGO_PKG_VERSION")))
        .connect_timeout(CONNECT)
        .redirect(redirect::Policy::none());
    adjust(builder).build().map_err(|error| {
        let cause = std::error::Error::source(&error).map(ToString::to_string);
        cause.unwrap_or_else(|| error.to_string())
    })
}

/// Whether what was begun at `from` may go on at `to`; else what is wrong with `to`, without its path and query.
pub(crate) fn same_security(from: &Url, to: &Url) -> Result<(), String> {
    match to.scheme() {
        "https" => Ok(()),
        "http" if from.scheme() == "http" => Ok(()),
        other => Err(format!("{other}://{}, away from TLS", to.host_str().unwrap_or_default())),
    }
}

pub(crate) fn is_loopback(url: &Url) -> bool {
    match url.host() {
        Some(Host::Domain(name)) => name == "localhost",
        Some(Host::Ipv4(address)) => address.is_loopback(),
        Some(Host::Ipv6(address)) => address.is_loopback(),
        None => false,
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
        let plain_http = vec!["plain.test".into(), "other.test:5000".into()];
        let http = Http::new(Config { plain_http, ..Config::default() });
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
        let http = Http::new(Config { plain_loopback: false, ..Config::default() });
        assert_eq!(http.base("127.0.0.1:1").unwrap().as_str(), "https://127.0.0.1:1/v2/");
    }
}
