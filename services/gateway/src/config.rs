//! What a gateway may be told.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Settings of the gateway, as they stand in the configuration file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Admits `file://` git remotes; the resolver and the orchestrator must admit them too.
    pub file_remotes: bool,
    /// The registry (`host[:port]`) of base images, which a request of the compatible API allows with `allow_baserep`; empty
    /// for that of `orchestrator.base_image_repository`, where the file has it.
    pub base_registry: String,
    /// The registry of finished images, for `allow_workspacerep`; likewise.
    pub workspace_registry: String,
    /// Serves over TLS; without it in clear.
    pub tls: Option<TlsConfig>,
}

/// The certificate that clients see, and what is asked of theirs. PEM files, each read anew when it changes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsConfig {
    /// The certificate and those between it and its authority.
    pub certificate: PathBuf,
    pub key: PathBuf,
    /// The authorities of clients' certificates.
    #[serde(default)]
    pub client_ca: Option<PathBuf>,
    #[serde(default)]
    pub client_auth: ClientAuth,
}

/// Whether clients need certificates. Without a `client_ca` none is asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ClientAuth {
    None,
    #[default]
    VerifyIfGiven,
    Require,
}

impl Config {
    /// What is wrong with it, each by its key.
    pub fn problems(&self) -> Vec<String> {
        let needs_ca = self
            .tls
            .as_ref()
            .is_some_and(|tls| tls.client_auth == ClientAuth::Require && tls.client_ca.is_none());
        let missing = "tls.client_ca: is missing, and `tls.client_auth` is `require`".to_owned();
        needs_ca.then_some(missing).into_iter().collect()
    }
}
