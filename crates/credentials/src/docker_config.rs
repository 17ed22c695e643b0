//! Docker's `config.json`: credentials by registry, and which helper programs are asked for more
//! (<https://docs.docker.com/reference/cli/docker/login/>).

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use kiln_registry::{Credential, TOKEN_USER, registry_name};
use secrecy::{ExposeSecret as _, SecretString};
use serde::Deserialize;

use crate::helper::HelperName;

#[derive(Debug, Default)]
pub(crate) struct DockerConfig {
    logins: BTreeMap<String, Credential>,
    helpers: BTreeMap<String, HelperName>,
    store: Option<HelperName>,
}

/// What is wrong with a file. It quotes no value, which may be a secret.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Flaw {
    #[error("line {line}, column {column}: no JSON as Docker writes it")]
    Json { line: usize, column: usize },
    #[error("auths, {registry}: `auth` is no base64 of username:password")]
    Auth { registry: String },
    #[error("{key}: a credential helper's name has letters, digits, `.`, `_` and `-` only")]
    Helper { key: String },
}

#[derive(Deserialize)]
#[serde(default, rename_all = "camelCase")]
#[derive(Default)]
struct File {
    auths: BTreeMap<String, Auth>,
    cred_helpers: BTreeMap<String, String>,
    creds_store: String,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Auth {
    auth: SecretString,
    username: String,
    password: SecretString,
    identitytoken: SecretString,
    registrytoken: SecretString,
}

impl DockerConfig {
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, Flaw> {
        let file: File = serde_json::from_slice(bytes)
            .map_err(|error| Flaw::Json { line: error.line(), column: error.column() })?;
        let mut config = Self::default();
        for (key, auth) in file.auths {
            let registry = registry_name(&key);
            let credential = auth.credential().ok_or_else(|| Flaw::Auth { registry: registry.clone() })?;
            // Of several names of one registry, the one that Docker itself writes counts.
            let own = key == registry || key == HUB_KEY;
            if let Some(credential) = credential
                && (own || !config.logins.contains_key(&registry))
            {
                config.logins.insert(registry, credential);
            }
        }
        for (key, name) in file.cred_helpers {
            let flaw = || Flaw::Helper { key: format!("credHelpers, {key}") };
            config.helpers.insert(registry_name(&key), HelperName::new(&name).ok_or_else(flaw)?);
        }
        if !file.creds_store.is_empty() {
            let flaw = || Flaw::Helper { key: "credsStore".into() };
            config.store = Some(HelperName::new(&file.creds_store).ok_or_else(flaw)?);
        }
        Ok(config)
    }

    pub(crate) fn login(&self, registry: &str) -> Option<&Credential> {
        self.logins.get(registry)
    }

    /// The helper to ask for a registry, before what the file itself says of it.
    pub(crate) fn helper(&self, registry: &str) -> Option<&HelperName> {
        self.helpers.get(registry).or(self.store.as_ref())
    }

    /// The registries that it names, by login or helper.
    pub(crate) fn registries(&self) -> impl Iterator<Item = &String> {
        self.logins.keys().chain(self.helpers.keys())
    }
}

/// How Docker names Docker Hub in the file, and to a helper.
pub(crate) const HUB_KEY: &str = "https://index.docker.io/v1/";

impl Auth {
    /// `Some(None)` for an entry that only says that a helper has one; `None` for what can't be one.
    fn credential(self) -> Option<Option<Credential>> {
        let given = |secret: &SecretString| !secret.expose_secret().is_empty();
        if given(&self.identitytoken) {
            return Some(Some(Credential::IdentityToken(self.identitytoken)));
        }
        if given(&self.registrytoken) {
            return Some(Some(Credential::RegistryToken(self.registrytoken)));
        }
        let (username, password) = if given(&self.auth) {
            // Docker pads some with NUL.
            let pair = STANDARD.decode(self.auth.expose_secret().trim()).ok()?;
            let pair = SecretString::from(String::from_utf8(pair).ok()?.trim_end_matches('\0').to_owned());
            let (username, password) = pair.expose_secret().split_once(':')?;
            (username.to_owned(), SecretString::from(password))
        } else {
            (self.username, self.password)
        };
        Some(login(username, password))
    }
}

/// What a user name and a password stand for; `None` if both are empty.
pub(crate) fn login(username: String, password: SecretString) -> Option<Credential> {
    if username.is_empty() && password.expose_secret().is_empty() {
        None
    } else if username == TOKEN_USER {
        Some(Credential::IdentityToken(password))
    } else {
        Some(Credential::Password { username, password })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(config: &DockerConfig, registry: &str) -> Option<[String; 3]> {
        config.login(registry).map(|login| login.distinguishing().map(str::to_owned))
    }

    #[test]
    fn every_form_of_a_login() {
        let auth = |pair: &str| STANDARD.encode(pair);
        let text = serde_json::json!({
            "auths": {
                "https://index.docker.io/v1/": {"auth": auth("hub:pass:word")},
                "docker.io": {"auth": auth("other:login")},
                "plain.test:5000": {"username": "u", "password": "p"},
                "https://identity.test": {"auth": auth("00000000-0000-0000-0000-000000000000:"), "identitytoken": "refresh"},
                "registry.test": {"registrytoken": "bearer"},
                "token.test": {"auth": auth("<token>:refresh")},
                "nul.test": {"auth": auth("u:p\0\0")},
                "marker.test": {},
            },
            "HttpHeaders": {"User-Agent": "x"},
            "credHelpers": {"helped.test": "ecr-login"},
        });
        let config = DockerConfig::parse(text.to_string().as_bytes()).unwrap();
        for (registry, expected) in [
            ("docker.io", Some(["password", "hub", "pass:word"])),
            ("plain.test:5000", Some(["password", "u", "p"])),
            ("identity.test", Some(["identity token", "", "refresh"])),
            ("registry.test", Some(["registry token", "", "bearer"])),
            ("token.test", Some(["identity token", "", "refresh"])),
            ("nul.test", Some(["password", "u", "p"])),
            ("marker.test", None),
            ("plain.test", None),
            ("registry.test.evil.test", None),
            ("evil-registry.test", None),
        ] {
            assert_eq!(told(&config, registry), expected.map(|texts| texts.map(str::to_owned)), "{registry}");
        }
        assert!(config.helper("helped.test").is_some() && config.helper("registry.test").is_none());
        let stored = DockerConfig::parse(br#"{"credsStore": "pass"}"#).unwrap();
        assert!(stored.helper("any.test").is_some());
    }

    #[test]
    fn what_is_wrong_is_named_and_no_secret_shown() {
        for (text, expected) in [
            (r#"{"auths": {"a.test": {"auth": 12345}}}"#, "line 1"),
            (r#"{"auths": {"a.test": {"password": ["s3cret"]}}}"#, "line 1"),
            (r#"{"auths": {"a.test": {"auth": "s3cret!"}}}"#, "a.test"),
            (r#"{"auths": {"a.test": {"auth": "czNjcmV0"}}}"#, "a.test"),
            (r#"{"credHelpers": {"a.test": "../s3cret"}}"#, "credHelpers, a.test"),
            (r#"{"credsStore": "/bin/sh"}"#, "credsStore"),
            ("", "line 1"),
        ] {
            let flaw = DockerConfig::parse(text.as_bytes()).unwrap_err().to_string();
            assert!(flaw.contains(expected) && !flaw.contains("s3cret"), "{flaw}");
        }
    }
}
