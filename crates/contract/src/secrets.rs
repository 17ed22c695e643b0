//! The secrets of a request. They travel and lie sealed; this is what is inside.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

/// What a request brings that must never be seen: credentials, and which of the installation's may be used.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Secrets {
    #[serde(default)]
    pub git_username: String,
    #[serde(default)]
    pub git_password: String,
    #[serde(default)]
    pub registry: RegistryAuth,
    /// For `RUN --mount=type=secret`: id → content, base64.
    #[serde(default)]
    pub mounts: BTreeMap<String, String>,
}

/// Which registry credentials a request may use.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegistryAuth {
    /// The installation's credentials for every registry …
    #[serde(default)]
    pub allow_all: bool,
    /// … or only for these hosts.
    #[serde(default)]
    pub allowed_hosts: Vec<String>,
    /// The caller's own: host → `username:password`. They win over the installation's.
    #[serde(default)]
    pub credentials: BTreeMap<String, String>,
}

impl Secrets {
    /// Every text in it that must not be seen in a log. A user's name is none.
    pub fn texts(&self) -> impl Iterator<Item = &str> {
        let passwords = self.registry.credentials.values().filter_map(|pair| pair.split_once(':').map(|(_, p)| p));
        std::iter::once(self.git_password.as_str())
            .chain(passwords)
            .chain(self.registry.credentials.values().map(String::as_str))
            .filter(|text| !text.is_empty())
    }
}

impl fmt::Debug for Secrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secrets(…)")
    }
}

impl fmt::Debug for RegistryAuth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RegistryAuth(…)")
    }
}
