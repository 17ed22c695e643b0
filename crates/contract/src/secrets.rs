//! The secrets of a request. They travel and lie sealed; this is what is inside.

use std::collections::BTreeMap;
use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use kiln_domain::source::git_secret;
use serde::{Deserialize, Serialize};

/// What a request brings that must never be seen: credentials, and which of the installation's may be used.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Secrets {
    #[serde(default)]
    pub git_username: String,
    #[serde(default)]
    pub git_password: String,
    /// What gives `username:password`, or a password, once; empty where these are known.
    #[serde(default)]
    pub git_one_time_url: String,
    #[serde(default)]
    pub registry: RegistryAuth,
    /// For `RUN --mount=type=secret`: id → content, base64.
    #[serde(default)]
    pub mounts: BTreeMap<String, String>,
    /// Of a request of the compatible API.
    #[serde(default)]
    pub workspace: Option<Workspace>,
}

/// How a request wants the workspace that builds.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Workspace {
    /// `contentservice.WorkspaceInitializer`, as protobuf, base64.
    pub initializer: String,
    pub supervisor_ref: String,
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

/// What [`crate::orchestrator::OutputAccess`] is answered with: how outputs are read past this service, owner tokens
/// included. Sealed for who asked.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutputAccesses {
    /// By run, of those that were asked for.
    #[serde(default)]
    pub runs: BTreeMap<String, OutputAccess>,
    #[serde(default)]
    pub others: Vec<OthersBuild>,
}

/// Where an output is, and the headers of who reads it.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutputAccess {
    pub url: String,
    #[serde(default)]
    pub headers: BTreeMap<String, String>,
}

/// A build that is none of ours, in the place where ours run.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OthersBuild {
    pub id: String,
    pub target_ref: String,
    pub base_ref: String,
    #[serde(default)]
    pub started_at: Option<jiff::Timestamp>,
    #[serde(default)]
    pub output: Option<OutputAccess>,
}

impl Secrets {
    /// Everything in it that must not be seen in a log or an event. A user's name is none; one without a password is a
    /// token.
    pub fn hidden(&self) -> Vec<Vec<u8>> {
        let pairs = self.registry.credentials.values();
        let passwords = pairs.clone().filter_map(|pair| pair.split_once(':').map(|(_, password)| password));
        let texts = std::iter::once(git_secret(&self.git_username, &self.git_password))
            .chain(passwords)
            .chain(pairs.map(String::as_str))
            .chain([self.git_one_time_url.as_str()]);
        // What is no base64 is shown as it came, if at all.
        let mounts = self
            .mounts
            .values()
            .map(|content| STANDARD.decode(content).unwrap_or_else(|_| content.clone().into()));
        texts.map(|text| text.as_bytes().to_vec()).chain(mounts).filter(|bytes| !bytes.is_empty()).collect()
    }
}

impl fmt::Debug for Secrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secrets(…)")
    }
}

impl fmt::Debug for Workspace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Workspace(…)")
    }
}

impl fmt::Debug for OutputAccesses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("OutputAccesses(…)")
    }
}

impl fmt::Debug for OutputAccess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("OutputAccess(…)")
    }
}

impl fmt::Debug for OthersBuild {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "OthersBuild({})", self.id)
    }
}

impl fmt::Debug for RegistryAuth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RegistryAuth(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_git_login_the_password_is_hidden_or_a_username_that_stands_alone() {
        let hidden = |username: &str, password: &str| {
            let secrets = Secrets {
                git_username: username.into(),
                git_password: password.into(),
                ..Secrets::default()
            };
            secrets.hidden()
        };
        assert_eq!(hidden("ann", "word"), [b"word".to_vec()]);
        assert_eq!(hidden("token", ""), [b"token".to_vec()]);
        assert_eq!(hidden("", "token"), [b"token".to_vec()]);
        assert!(hidden("", "").is_empty());
    }
}
