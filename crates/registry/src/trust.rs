//! The HTTP clients, one for each way to trust: whose certificates are believed, and what is shown of ourselves.
//!
//! Their files are read anew when they change (also where a link is moved, as Kubernetes does with a mounted secret). While
//! the new ones can't be used, the client that was made of the old ones goes on.

use std::collections::HashMap;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use kiln_domain::registries::{ClientCertificate, Registries};
use reqwest::{Certificate, Client, ClientBuilder, Identity, redirect};
use url::{Host, Url};

const CONNECT: Duration = Duration::from_secs(10);

#[derive(Debug, Default)]
pub(crate) struct Clients(Mutex<HashMap<Trust, Made>>);

/// All that a client is made of.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Trust {
    /// For plain HTTP on this host: no trust roots are read.
    plain: bool,
    /// For this host itself, which no proxy reaches.
    near: bool,
    ca: Option<PathBuf>,
    client_certificate: Option<(PathBuf, PathBuf)>,
}

#[derive(Debug)]
struct Made {
    of: Vec<Option<Stamp>>,
    client: Client,
}

/// Tells a file from what it was: device, number, length and time of its last change.
type Stamp = (u64, u64, u64, i64, i64);

impl Clients {
    /// The client for a URL that is asked on behalf of `registry`. A client certificate is shown to the host that it is
    /// configured for alone; a registry's CA is also believed of its token service and of where it redirects to.
    pub(crate) fn client(
        &self,
        registries: &Registries,
        registry: &str,
        url: &Url,
    ) -> Result<Client, String> {
        let trust = Trust::of(registries, registry, url);
        let stamps = trust.stamps();
        let mut made = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match made.get_mut(&trust) {
            Some(kept) if kept.of == stamps => Ok(kept.client.clone()),
            Some(kept) => {
                match trust.make() {
                    Ok(client) => kept.client = client,
                    Err(problem) => {
                        tracing::error!("the former certificates for {registry} stay in use: {problem}");
                    }
                }
                kept.of = stamps;
                Ok(kept.client.clone())
            }
            None => {
                let client = trust.make()?;
                made.insert(trust, Made { of: stamps, client: client.clone() });
                Ok(client)
            }
        }
    }
}

impl Trust {
    fn of(registries: &Registries, registry: &str, url: &Url) -> Self {
        let near = is_loopback(url);
        if url.scheme() == "http" {
            return Self { plain: near, near, ca: None, client_certificate: None };
        }
        let port = url.port_or_known_default().unwrap_or_default();
        let host = match url.host_str().unwrap_or_default() {
            HUB_ON_THE_WIRE => HUB,
            other => other,
        };
        let own = registries.reach(&format!("{host}:{port}"));
        let asked = registries.reach(registry);
        let ca = own.and_then(|own| own.ca.clone()).or_else(|| asked.and_then(|asked| asked.ca.clone()));
        let client_certificate = own.and_then(|own| own.client_certificate.clone());
        let files = |client: ClientCertificate| (client.certificate, client.key);
        Self { plain: false, near, ca, client_certificate: client_certificate.map(files) }
    }

    fn stamps(&self) -> Vec<Option<Stamp>> {
        let client = self.client_certificate.iter().flat_map(|(certificate, key)| [certificate, key]);
        self.ca.iter().chain(client).map(|path| stamp(path)).collect()
    }

    fn make(&self) -> Result<Client, String> {
        crate::install_crypto_provider();
        let mut builder = Client::builder().connect_timeout(CONNECT).redirect(redirect::Policy::none());
        if self.plain {
            builder = builder.tls_certs_only([]);
        }
        if self.near {
            builder = builder.no_proxy();
        }
        if let Some(path) = &self.ca {
            builder = with_ca(builder, path)?;
        }
        if let Some((certificate, key)) = &self.client_certificate {
            builder = builder.identity(identity(certificate, key)?);
        }
        builder.build().map_err(|error| {
            let cause = std::error::Error::source(&error).map(ToString::to_string);
            let cause = cause.unwrap_or_else(|| error.to_string());
            match &self.client_certificate {
                Some((certificate, _)) => format!("{}: {cause}", certificate.display()),
                None => cause,
            }
        })
    }
}

/// Docker Hub, as references name it, and where it is.
pub(crate) const HUB: &str = "docker.io";
pub(crate) const HUB_ON_THE_WIRE: &str = "registry-1.docker.io";

fn with_ca(builder: ClientBuilder, path: &Path) -> Result<ClientBuilder, String> {
    let certificates = Certificate::from_pem_bundle(&read(path)?).unwrap_or_default();
    if certificates.is_empty() {
        return Err(format!("{} holds no certificate", path.display()));
    }
    Ok(builder.tls_certs_merge(certificates))
}

fn identity(certificate: &Path, key: &Path) -> Result<Identity, String> {
    let mut pem = read(certificate)?;
    pem.push(b'\n');
    pem.extend(read(key)?);
    let (certificate, key) = (certificate.display(), key.display());
    Identity::from_pem(&pem).map_err(|_| format!("{certificate} and {key} are no certificate and its key"))
}

fn read(path: &Path) -> Result<Vec<u8>, String> {
    std::fs::read(path).map_err(|error| format!("{} can't be read: {error}", path.display()))
}

fn stamp(path: &Path) -> Option<Stamp> {
    let file = std::fs::metadata(path).ok()?;
    Some((file.dev(), file.ino(), file.len(), file.mtime(), file.mtime_nsec()))
}

fn is_loopback(url: &Url) -> bool {
    match url.host() {
        Some(Host::Domain(name)) => name == "localhost",
        Some(Host::Ipv4(address)) => address.is_loopback(),
        Some(Host::Ipv6(address)) => address.is_loopback(),
        None => false,
    }
}
