//! The connection to ws-manager over mutual TLS.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result, ensure};
use kiln_domain::engine::{Engine as _, EngineError};
use kiln_domain::run::RunSecrets;
use kiln_engine_ws_manager::Tls;
use kiln_testkit::engine_conformance::Job;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use rustls::pki_types::PrivateKeyDer;
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use tempfile::TempDir;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

use crate::place::WsManagerPlace;

const SOON: Duration = Duration::from_secs(60);

/// An authority, and the files of a client that it vouches for.
struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    folder: TempDir,
}

impl Authority {
    fn new(name: &str) -> Result<Self> {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
        let authority = Self { issuer, folder: TempDir::new()? };
        std::fs::write(authority.path("ca.crt"), authority.issuer.pem())?;
        authority.vouch_for(&authority)?;
        Ok(authority)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Writes a client's certificate into another's folder.
    fn vouch_for(&self, client: &Self) -> Result<()> {
        let key = KeyPair::generate()?;
        let params = CertificateParams::new(vec!["image-builder-mk3".to_owned()])?;
        std::fs::write(client.path("tls.crt"), params.signed_by(&key, &self.issuer)?.pem())?;
        std::fs::write(client.path("tls.key"), key.serialize_pem())?;
        Ok(())
    }

    fn tls(&self) -> Tls {
        Tls { ca: self.path("ca.crt"), crt: self.path("tls.crt"), key: self.path("tls.key") }
    }

    /// Asks for a client's certificate, shows one of its own for `name`, and passes on what comes to `target`.
    async fn guard(&self, name: &str, expired: bool, target: SocketAddr) -> Result<SocketAddr> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(vec![name.to_owned()])?;
        if expired {
            params.not_after = (SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000)).into();
        }
        let certificate = params.signed_by(&key, &self.issuer)?.der().clone();
        let mut roots = RootCertStore::empty();
        roots.add(self.issuer.der().clone())?;
        let key = PrivateKeyDer::try_from(key.serialize_der()).map_err(anyhow::Error::msg)?;
        let mut config = ServerConfig::builder()
            .with_client_cert_verifier(WebPkiClientVerifier::builder(Arc::new(roots)).build()?)
            .with_single_cert(vec![certificate], key)?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        let (acceptor, listener) =
            (TlsAcceptor::from(Arc::new(config)), TcpListener::bind("127.0.0.1:0").await?);
        let address = listener.local_addr()?;
        tokio_util::task::TaskTracker::new().spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                let acceptor = acceptor.clone();
                tokio_util::task::TaskTracker::new().spawn(async move {
                    // Whom it refuses is told so by the handshake.
                    if let Ok(mut near) = acceptor.accept(near).await
                        && let Ok(mut far) = TcpStream::connect(target).await
                    {
                        let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
                    }
                });
            }
        });
        Ok(address)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_goes_its_way_over_mutual_tls_whatever_the_address() -> Result<()> {
    let (place, authority) = (WsManagerPlace::new().await?, Authority::new("ours")?);
    let address = authority.guard("ws-manager", false, place.ws_manager.address).await?;
    let engine = place.ws_engine_at(address.to_string(), Some(authority.tls()));
    let spec = place.spec(Job::Succeeds)?;
    let handle = engine.start(&spec, &RunSecrets::default()).await?;
    let ended = tokio::time::timeout(SOON, engine.ended(&spec.run, &handle)).await??;
    ensure!(ended.recorded.is_some(), "{ended:?}");
    engine.close().await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_with_a_certificate_is_said() -> Result<()> {
    let (place, authority, stranger) =
        (WsManagerPlace::new().await?, Authority::new("ours")?, Authority::new("theirs")?);
    let target = place.ws_manager.address;
    let strange_client = Authority::new("strange")?;
    std::fs::write(strange_client.path("ca.crt"), authority.issuer.pem())?;
    for (guard, tls, expected) in [
        (stranger.guard("ws-manager", false, target).await?, authority.tls(), "UnknownIssuer"),
        (authority.guard("ws-manager", true, target).await?, authority.tls(), "expired"),
        (
            authority.guard("other", false, target).await?,
            authority.tls(),
            "not valid for name \"ws-manager\"",
        ),
        // It refuses ours. TLS 1.3 lets a client know that so late that the call may have ended with less: the log has it.
        (authority.guard("ws-manager", false, target).await?, strange_client.tls(), "ws-manager: "),
    ] {
        let engine = place.ws_engine_at(guard.to_string(), Some(tls));
        let spec = place.spec(Job::Succeeds)?;
        let refused = engine.observe(&spec.run).await;
        let Err(EngineError::Unavailable(why)) = refused else { anyhow::bail!("{expected}: {refused:?}") };
        ensure!(why.contains(expected), "{expected}: {why}");
        engine.close().await;
    }
    ensure!(place.ws_manager.starts() == 0);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_renewed_certificate_is_used_for_the_next_connection() -> Result<()> {
    let (place, authority, client) =
        (WsManagerPlace::new().await?, Authority::new("ours")?, Authority::new("theirs")?);
    std::fs::write(client.path("ca.crt"), authority.issuer.pem())?;
    let address = authority.guard("ws-manager", false, place.ws_manager.address).await?;
    let engine = place.ws_engine_at(address.to_string(), Some(client.tls()));
    let spec = place.spec(Job::Succeeds)?;
    ensure!(engine.observe(&spec.run).await.is_err(), "nobody vouches for it");
    authority.vouch_for(&client)?;
    let observing = async {
        while engine.observe(&spec.run).await.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(SOON, observing).await.context("it is not used")?;
    engine.close().await;
    Ok(())
}
