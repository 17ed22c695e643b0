//! The connection to ws-manager: made when it is needed, made again when it is lost.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::Status;
use tonic::transport::{Channel, Endpoint, Uri};

use crate::alerts::Alerting;
use crate::config::{Config, Tls};

/// The name in its certificate, whatever its address.
const SERVER_NAME: &str = "ws-manager";
const CONNECT: Duration = Duration::from_secs(5);
/// A connection that says nothing is asked for a sign of life, which ws-manager admits every 10 s.
const KEEPALIVE: Duration = Duration::from_secs(20);
const KEEPALIVE_ANSWER: Duration = Duration::from_secs(10);

/// Why there can be no connection.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("`address`: `{0}` is no host:port")]
    Address(String),
    #[error("`tls.{key}`: {} can't be read as PEM", path.display())]
    Pem { key: &'static str, path: PathBuf, source: rustls::pki_types::pem::Error },
    #[error("there can be no HTTP client")]
    Http(#[source] reqwest::Error),
    #[error("the certificates under `tls` can't be used")]
    Unusable(#[source] rustls::Error),
}

trait Wire: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Wire for T {}

/// Checks what is configured; connects to nobody yet.
pub(crate) fn channel(config: &Config) -> Result<Channel, Error> {
    let wrong = || Error::Address(config.address.clone());
    let has_port = config
        .address
        .rsplit_once(':')
        .is_some_and(|(host, port)| !host.is_empty() && !host.contains('/') && port.parse::<u16>().is_ok());
    if !has_port {
        return Err(wrong());
    }
    let endpoint = Endpoint::from_shared(format!("http://{}", config.address))
        .map_err(|_| wrong())?
        .http2_keep_alive_interval(KEEPALIVE)
        .keep_alive_timeout(KEEPALIVE_ANSWER)
        .keep_alive_while_idle(true);
    if let Some(tls) = &config.tls {
        client(tls)?;
    }
    let (address, tls) = (config.address.clone(), config.tls.clone());
    Ok(endpoint.connect_with_connector_lazy(tower::service_fn(move |_: Uri| {
        let (address, tls) = (address.clone(), tls.clone());
        async move {
            let connected = tokio::time::timeout(CONNECT, connect(&address, tls.as_ref())).await;
            connected.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())).map(TokioIo::new)
        }
    })))
}

/// What asks supervisors.
pub(crate) fn http() -> Result<reqwest::Client, Error> {
    reqwest::Client::builder().connect_timeout(CONNECT).build().map_err(Error::Http)
}

/// What ws-manager, or the way to it, has against a call: with the causes, which its own text leaves out.
pub(crate) fn told(status: &Status) -> String {
    let mut text = status.message().to_owned();
    let mut cause = std::error::Error::source(status);
    while let Some(error) = cause {
        let words = error.to_string();
        if !text.contains(&words) {
            text = format!("{text}: {words}");
        }
        cause = error.source();
    }
    text
}

async fn connect(address: &str, tls: Option<&Tls>) -> io::Result<Box<dyn Wire>> {
    let tcp = TcpStream::connect(address).await?;
    tcp.set_nodelay(true)?;
    let Some(tls) = tls else { return Ok(Box::new(tcp)) };
    let connector = TlsConnector::from(Arc::new(client(tls).map_err(io::Error::other)?));
    let name = ServerName::try_from(SERVER_NAME).map_err(io::Error::other)?;
    Ok(Box::new(Alerting(connector.connect(name, tcp).await?)))
}

fn client(tls: &Tls) -> Result<ClientConfig, Error> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates("ca", &tls.ca)? {
        roots.add(certificate).map_err(Error::Unusable)?;
    }
    let key = PrivateKeyDer::from_pem_file(&tls.key).map_err(|source| Error::Pem {
        key: "key",
        path: tls.key.clone(),
        source,
    })?;
    let mut client = ClientConfig::builder()
        .with_root_certificates(roots)
        .with_client_auth_cert(certificates("crt", &tls.crt)?, key)
        .map_err(Error::Unusable)?;
    client.alpn_protocols = vec![b"h2".to_vec()];
    Ok(client)
}

fn certificates(key: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, Error> {
    let pem = |source| Error::Pem { key, path: path.to_owned(), source };
    CertificateDer::pem_file_iter(path).map_err(pem)?.collect::<Result<_, _>>().map_err(pem)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_configured_wrong_is_found_before_anybody_is_connected_to() {
        let config = |address: &str, tls| Config {
            address: address.into(),
            tls,
            builder_image: "r.test/bob:1".into(),
            pull_secret: String::new(),
        };
        for address in ["", "ws-manager", ":8080", "http://x:1", "ws-manager:port"] {
            assert!(matches!(channel(&config(address, None)), Err(Error::Address(_))), "{address}");
        }
        assert!(channel(&config("ws-manager:8080", None)).is_ok());
        let nowhere = |name: &str| PathBuf::from("/nowhere").join(name);
        let tls = Tls { ca: nowhere("ca.crt"), crt: nowhere("tls.crt"), key: nowhere("tls.key") };
        let error = channel(&config("ws-manager:8080", Some(tls))).err().unwrap();
        assert_eq!(error.to_string(), "`tls.ca`: /nowhere/ca.crt can't be read as PEM");
    }
}
