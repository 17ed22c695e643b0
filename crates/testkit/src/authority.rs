//! A certificate authority of one's own, and what it has signed: files, as programs read them.

use std::path::{Path, PathBuf};

use anyhow::Result;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair};
use tempfile::TempDir;

/// A name that no name service knows: only a proxy can lead there.
pub const HIDDEN_HOST: &str = "registry.kiln.invalid";

/// Its files are removed with it.
#[derive(Debug)]
pub struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    folder: TempDir,
}

impl Authority {
    /// With a server's certificate for this host and [`HIDDEN_HOST`], and a client's.
    pub fn new() -> Result<Self> {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
        let authority = Self { issuer, folder: TempDir::new()? };
        std::fs::write(authority.ca(), authority.issuer.pem())?;
        let names = ["127.0.0.1", "localhost", HIDDEN_HOST].map(str::to_owned);
        authority.sign(names.into(), ExtendedKeyUsagePurpose::ServerAuth, authority.server())?;
        let client = vec!["kiln-client".to_owned()];
        authority.sign(client, ExtendedKeyUsagePurpose::ClientAuth, authority.client())?;
        Ok(authority)
    }

    fn sign(&self, names: Vec<String>, to: ExtendedKeyUsagePurpose, files: [PathBuf; 2]) -> Result<()> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(names)?;
        params.extended_key_usages = vec![to];
        let [certificate_file, key_file] = files;
        std::fs::write(certificate_file, params.signed_by(&key, &self.issuer)?.pem())?;
        Ok(std::fs::write(key_file, key.serialize_pem())?)
    }

    pub fn ca(&self) -> PathBuf {
        self.path("ca.crt")
    }

    /// Certificate and key of a server.
    pub fn server(&self) -> [PathBuf; 2] {
        ["server.crt", "server.key"].map(|name| self.path(name))
    }

    /// Certificate and key of a client.
    pub fn client(&self) -> [PathBuf; 2] {
        ["client.crt", "client.key"].map(|name| self.path(name))
    }

    fn path(&self, name: &str) -> PathBuf {
        Path::new(self.folder.path()).join(name)
    }
}
