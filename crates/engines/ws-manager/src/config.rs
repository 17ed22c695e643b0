//! How ws-manager is reached, and what workspaces are given.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Settings of the engine, as they stand in the configuration file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// `host:port` of its gRPC API.
    pub address: String,
    /// Without it the connection is in clear.
    #[serde(default)]
    pub tls: Option<Tls>,
    /// The image of the workspaces that build: it holds `/app/bob`.
    pub builder_image: String,
    /// The Kubernetes secret with the credentials of the registry that is pushed to; empty for none.
    #[serde(default)]
    pub pull_secret: String,
}

/// PEM files; read anew for each connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tls {
    /// Its authority.
    pub ca: PathBuf,
    /// Our certificate, and its key.
    pub crt: PathBuf,
    pub key: PathBuf,
}
