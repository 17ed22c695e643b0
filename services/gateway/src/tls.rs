//! TLS of the public port. Certificates are renewed while we run: each file is read anew when it has changed, and one that
//! can't be used changes nothing.

use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use futures::{Stream, StreamExt as _};
use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ServerConfig, WebPkiClientVerifier};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::server::{Connected, TcpConnectInfo};

use crate::config::{ClientAuth, TlsConfig};

/// A client that doesn't finish its handshake within this is dropped.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Handshakes at once; further clients wait in the listener's backlog.
const HANDSHAKES: usize = 256;
/// After a connection that can't be accepted, as where there are no file descriptors left.
const PAUSE: Duration = Duration::from_millis(100);

/// Why a certificate can't be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("`{key}`: {} can't be read as PEM", path.display())]
    Pem { key: &'static str, path: PathBuf, source: rustls::pki_types::pem::Error },
    #[error("`{key}`: there is no certificate in {}", path.display())]
    Empty { key: &'static str, path: PathBuf },
    #[error("certificate and key can't be used")]
    Unusable(#[source] rustls::Error),
    #[error("`client_ca` can't be used: {0}")]
    ClientCa(String),
}

pub(crate) struct Tls {
    config: TlsConfig,
    current: Mutex<Current>,
}

struct Current {
    acceptor: TlsAcceptor,
    /// When each of the files was written.
    written: Vec<Option<SystemTime>>,
}

impl Tls {
    pub(crate) fn open(config: TlsConfig) -> Result<Self, Error> {
        let written = written(&config);
        let acceptor = load(&config)?;
        Ok(Self { config, current: Mutex::new(Current { acceptor, written }) })
    }

    /// Clients whose handshake is done.
    pub(crate) fn incoming(self, listener: TcpListener) -> impl Stream<Item = io::Result<Connection>> {
        let tls = Arc::new(self);
        TcpListenerStream::new(listener)
            .map(move |tcp| {
                let tls = tls.clone();
                async move {
                    match tcp {
                        Ok(tcp) => tls.accept(tcp).await,
                        Err(error) => {
                            tracing::warn!("a connection can't be accepted: {error}");
                            tokio::time::sleep(PAUSE).await;
                            None
                        }
                    }
                }
            })
            .buffer_unordered(HANDSHAKES)
            .filter_map(|connection| futures::future::ready(connection.map(Ok)))
    }

    async fn accept(&self, tcp: TcpStream) -> Option<Connection> {
        let handshake = async {
            tcp.set_nodelay(true)?;
            self.acceptor().accept(tcp).await
        };
        match tokio::time::timeout(HANDSHAKE, handshake).await {
            Ok(Ok(stream)) => Some(Connection(stream)),
            Ok(Err(error)) => {
                tracing::debug!("a client's TLS handshake failed: {error}");
                None
            }
            Err(_) => {
                tracing::debug!("a client did not finish its TLS handshake");
                None
            }
        }
    }

    /// What the files say now.
    fn acceptor(&self) -> TlsAcceptor {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        let written = written(&self.config);
        if written != current.written {
            match load(&self.config) {
                Ok(acceptor) => {
                    tracing::info!("the certificate {} is read anew", self.config.certificate.display());
                    current.acceptor = acceptor;
                }
                Err(error) => tracing::error!(
                    "the renewed certificate {} can't be used, the old one stays: {:#}",
                    self.config.certificate.display(),
                    anyhow::Error::from(error)
                ),
            }
            // Also of what can't be used, so that it is said once.
            current.written = written;
        }
        current.acceptor.clone()
    }
}

fn written(config: &TlsConfig) -> Vec<Option<SystemTime>> {
    [Some(&config.certificate), Some(&config.key), config.client_ca.as_ref()]
        .into_iter()
        .flatten()
        .map(|path| std::fs::metadata(path).and_then(|metadata| metadata.modified()).ok())
        .collect()
}

fn load(config: &TlsConfig) -> Result<TlsAcceptor, Error> {
    let chain = certificates("certificate", &config.certificate)?;
    let key = PrivateKeyDer::from_pem_file(&config.key).map_err(|source| Error::Pem {
        key: "key",
        path: config.key.clone(),
        source,
    })?;
    let builder = ServerConfig::builder();
    let builder = match &config.client_ca {
        Some(path) if config.client_auth != ClientAuth::None => {
            let mut roots = RootCertStore::empty();
            for certificate in certificates("client_ca", path)? {
                roots.add(certificate).map_err(|error| Error::ClientCa(error.to_string()))?;
            }
            let verifier = WebPkiClientVerifier::builder(Arc::new(roots));
            let verifier = match config.client_auth {
                ClientAuth::Require => verifier,
                ClientAuth::None | ClientAuth::VerifyIfGiven => verifier.allow_unauthenticated(),
            };
            builder.with_client_cert_verifier(
                verifier.build().map_err(|error| Error::ClientCa(error.to_string()))?,
            )
        }
        _ => builder.with_no_client_auth(),
    };
    let mut server = builder.with_single_cert(chain, key).map_err(Error::Unusable)?;
    server.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(server)))
}

fn certificates(key: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, Error> {
    let pem = |source| Error::Pem { key, path: path.to_owned(), source };
    let found: Vec<_> =
        CertificateDer::pem_file_iter(path).map_err(pem)?.collect::<Result<_, _>>().map_err(pem)?;
    if found.is_empty() { Err(Error::Empty { key, path: path.to_owned() }) } else { Ok(found) }
}

/// A client over TLS, as tonic takes one.
pub(crate) struct Connection(TlsStream<TcpStream>);

impl Connected for Connection {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> TcpConnectInfo {
        self.0.get_ref().0.connect_info()
    }
}

impl AsyncRead for Connection {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().0).poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().0).poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().0).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().0).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
    use rustls::ClientConfig;
    use rustls::pki_types::ServerName;
    use tempfile::TempDir;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio_rustls::TlsConnector;

    use super::*;

    /// An authority, and the files of a server that it vouches for.
    struct Authority {
        issuer: CertifiedIssuer<'static, KeyPair>,
        folder: TempDir,
    }

    impl Authority {
        fn new() -> Self {
            let mut params = CertificateParams::default();
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
            let authority = Self { issuer, folder: TempDir::new().unwrap() };
            std::fs::write(authority.path("ca.crt"), authority.issuer.pem()).unwrap();
            authority.renew();
            authority
        }

        fn path(&self, name: &str) -> PathBuf {
            self.folder.path().join(name)
        }

        fn issue(&self) -> (rcgen::Certificate, KeyPair) {
            let key = KeyPair::generate().unwrap();
            let params = CertificateParams::new(vec!["image-builder-mk3".to_owned()]).unwrap();
            (params.signed_by(&key, &self.issuer).unwrap(), key)
        }

        /// Writes a new certificate of the server; gives it.
        fn renew(&self) -> Vec<u8> {
            let (certificate, key) = self.issue();
            std::fs::write(self.path("tls.key"), key.serialize_pem()).unwrap();
            std::fs::write(self.path("tls.crt"), certificate.pem()).unwrap();
            certificate.der().to_vec()
        }

        fn config(&self, client_auth: ClientAuth) -> TlsConfig {
            TlsConfig {
                certificate: self.path("tls.crt"),
                key: self.path("tls.key"),
                client_ca: Some(self.path("ca.crt")),
                client_auth,
            }
        }

        /// Connects as a client with a certificate of `with`, and says something; gives the server's certificate.
        async fn connect(&self, at: std::net::SocketAddr, with: Option<&Self>) -> io::Result<Vec<u8>> {
            let mut roots = RootCertStore::empty();
            roots.add(self.issuer.der().clone()).unwrap();
            let builder = ClientConfig::builder().with_root_certificates(roots);
            let mut client = match with {
                None => builder.with_no_client_auth(),
                Some(authority) => {
                    let (certificate, key) = authority.issue();
                    let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
                    builder.with_client_auth_cert(vec![certificate.der().clone()], key).unwrap()
                }
            };
            client.alpn_protocols = vec![b"h2".to_vec()];
            let name = ServerName::try_from("image-builder-mk3").unwrap();
            let tcp = TcpStream::connect(at).await?;
            let mut stream = TlsConnector::from(Arc::new(client)).connect(name, tcp).await?;
            // A refusal of the client's certificate arrives after the handshake.
            stream.write_all(b"?").await?;
            stream.read_exact(&mut [0]).await?;
            let certificates = stream.get_ref().1.peer_certificates().unwrap_or_default();
            Ok(certificates.first().map(|certificate| certificate.to_vec()).unwrap_or_default())
        }
    }

    /// A server that answers each byte; where it listens.
    async fn echo(tls: Tls) -> std::net::SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        tokio_util::task::TaskTracker::new().spawn(async move {
            let mut incoming = std::pin::pin!(tls.incoming(listener));
            while let Some(Ok(mut connection)) = incoming.next().await {
                let mut byte = [0];
                if connection.read_exact(&mut byte).await.is_ok() {
                    connection.write_all(&byte).await.unwrap();
                    connection.flush().await.unwrap();
                }
            }
        });
        at
    }

    #[tokio::test]
    async fn a_renewed_certificate_is_served_and_a_broken_one_is_not() {
        let authority = Authority::new();
        let at = echo(Tls::open(authority.config(ClientAuth::None)).unwrap()).await;
        let first = authority.connect(at, None).await.unwrap();
        let renewed = authority.renew();
        let second = authority.connect(at, None).await.unwrap();
        assert!(first != renewed && second == renewed);
        std::fs::write(authority.path("tls.crt"), "no certificate").unwrap();
        assert_eq!(authority.connect(at, None).await.unwrap(), renewed);
    }

    #[tokio::test]
    async fn clients_certificates_are_asked_for_as_configured() {
        let (authority, stranger) = (Authority::new(), Authority::new());
        for (client_auth, anonymous, known, strange) in [
            (ClientAuth::None, true, true, true),
            (ClientAuth::VerifyIfGiven, true, true, false),
            (ClientAuth::Require, false, true, false),
        ] {
            let at = echo(Tls::open(authority.config(client_auth)).unwrap()).await;
            for (with, admitted) in [(None, anonymous), (Some(&authority), known), (Some(&stranger), strange)]
            {
                let connected = authority.connect(at, with).await;
                assert_eq!(connected.is_ok(), admitted, "{client_auth:?} {}: {connected:?}", with.is_some());
            }
        }
    }

    #[test]
    fn a_file_that_is_wrong_is_named_by_its_key() {
        let authority = Authority::new();
        let mut config = authority.config(ClientAuth::VerifyIfGiven);
        config.key = authority.path("nowhere");
        assert!(Tls::open(config.clone()).err().unwrap().to_string().starts_with("`key`: "));
        config.key = authority.path("tls.key");
        std::fs::write(authority.path("ca.crt"), "").unwrap();
        assert!(
            Tls::open(config).err().unwrap().to_string().starts_with("`client_ca`: there is no certificate")
        );
    }
}
