//! As whom, and until when, a registry is asked.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use secrecy::{ExposeSecret as _, SecretString};
use tokio::time::{Instant, timeout_at};

use crate::error::{Error, Problem};

/// How long what may pass is retried when nothing else is said.
const PATIENCE: Duration = Duration::from_secs(10);

/// Who asks, and how long an answer is of use.
#[derive(Clone)]
pub struct Access {
    /// Where credentials come from.
    pub keychain: Arc<dyn Keychain>,
    /// Where those for what is written to come from; without it, they are the same.
    pub push_keychain: Option<Arc<dyn Keychain>>,
    /// When the answer is of no use any more. Nothing goes on after it but the PUT of a manifest that had begun.
    pub deadline: Instant,
    /// How long each request is retried while its failure may pass (refused, cut, timeout, 5xx).
    pub patience: Duration,
    /// A registry (`host[:port]`) at which retries go on until the deadline.
    pub insist_on: Option<String>,
    /// Whether a 429 is waited out, within the same time; else it is the answer at once.
    pub wait_out_limits: bool,
}

impl Access {
    /// Without credentials, for at most the time given from now on.
    pub fn anonymous(time: Duration) -> Self {
        Self::new(Arc::new(Keyring::default()), after(time))
    }

    /// Where the credentials for what is written come from.
    pub fn to_push(&self) -> &Arc<dyn Keychain> {
        self.push_keychain.as_ref().unwrap_or(&self.keychain)
    }

    /// With the credentials of a keychain, until the deadline.
    pub fn new(keychain: Arc<dyn Keychain>, deadline: Instant) -> Self {
        Self {
            keychain,
            push_keychain: None,
            deadline,
            patience: PATIENCE,
            insist_on: None,
            wait_out_limits: false,
        }
    }

    /// When to stop to retry a request to the registry that begins now.
    pub(crate) fn give_up(&self, registry: &str) -> Instant {
        if self.insist_on.as_deref() == Some(registry) {
            self.deadline
        } else {
            self.deadline.min(after(self.patience))
        }
    }

    /// The work's result, or that `registry` did not answer before the deadline.
    pub(crate) async fn in_time<T>(
        &self,
        registry: &str,
        work: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        let late = |_| Err(Error::unavailable(registry, Problem::Timeout));
        timeout_at(self.deadline, work).await.unwrap_or_else(late)
    }
}

/// A time from now on; of one that no clock reaches, a year.
fn after(time: Duration) -> Instant {
    const YEAR: Duration = Duration::from_secs(365 * 24 * 3600);
    Instant::now() + time.min(YEAR)
}

/// Where credentials come from: a request's own, a Docker config file, a cloud's token service.
#[async_trait]
pub trait Keychain: Send + Sync {
    /// The credential for a registry (`docker.io`, `host[:port]`: exactly as a reference names it); `None` to ask
    /// anonymously. Asked at most once for each repository of a call, and only once a registry demands one.
    async fn credential(&self, registry: &str) -> Result<Option<Credential>, Error>;
}

/// What is shown to a registry, or to its token service.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Credential {
    /// A user name and a password, or what stands for one.
    Password { username: String, password: SecretString },
    /// A refresh token (Docker's "identity token"), which a token service gives tokens for.
    IdentityToken(SecretString),
    /// A token that the registry takes as it is.
    RegistryToken(SecretString),
}

/// The user name that says, to Docker and its like, that the password is an identity token.
pub const TOKEN_USER: &str = "<token>";

impl Credential {
    /// As [`Keyring::insert`] takes it; `None` for what has no such form.
    pub fn as_login(&self) -> Option<SecretString> {
        match self {
            Self::Password { username, password } => {
                Some(format!("{username}:{}", password.expose_secret()).into())
            }
            Self::IdentityToken(token) => Some(format!("{TOKEN_USER}:{}", token.expose_secret()).into()),
            Self::RegistryToken(_) => None,
        }
    }

    /// What tells it from any other: kind, user, secret. For the key of a cache; to be hashed there.
    pub fn distinguishing(&self) -> [&str; 3] {
        match self {
            Self::Password { username, password } => ["password", username, password.expose_secret()],
            Self::IdentityToken(token) => ["identity token", "", token.expose_secret()],
            Self::RegistryToken(token) => ["registry token", "", token.expose_secret()],
        }
    }
}

/// Credentials in memory, by registry. Empty, it is anonymous everywhere.
#[derive(Clone, Debug, Default)]
pub struct Keyring(BTreeMap<String, Credential>);

/// A credential that is not `username:password`. It does not say what it is.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the credential for {registry} is not of the form username:password")]
pub struct InvalidCredential {
    registry: String,
}

impl Keyring {
    /// Adds a credential for a registry, named exactly as a reference names it.
    pub fn put(&mut self, registry: &str, credential: Credential) {
        self.0.insert(registry.to_owned(), credential);
    }

    /// The credential for a registry, named exactly as a reference names it.
    pub fn get(&self, registry: &str) -> Option<&Credential> {
        self.0.get(registry)
    }

    /// The registries that it has a credential for.
    pub fn registries(&self) -> impl Iterator<Item = &String> {
        self.0.keys()
    }

    /// Adds `username:password` (the password may contain colons; `<token>:…` is an identity token, as Docker has it) for a registry, written as in a reference, as
    /// Docker Hub's other names, or as a URL of a Docker config file.
    pub fn insert(&mut self, registry: &str, login: &SecretString) -> Result<(), InvalidCredential> {
        let registry = registry_name(registry);
        let credential = match login.expose_secret().split_once(':') {
            Some((TOKEN_USER, token)) => Credential::IdentityToken(token.into()),
            Some((username, password)) if !username.is_empty() => {
                Credential::Password { username: username.to_owned(), password: password.into() }
            }
            _ => return Err(InvalidCredential { registry }),
        };
        self.0.insert(registry, credential);
        Ok(())
    }
}

#[async_trait]
impl Keychain for Keyring {
    async fn credential(&self, registry: &str) -> Result<Option<Credential>, Error> {
        Ok(self.0.get(registry).cloned())
    }
}

/// A registry's name as references have it, of one written so, as Docker Hub's other names, or as a URL of a Docker
/// config file.
pub fn registry_name(registry: &str) -> String {
    let host = registry.strip_prefix("https://").or(registry.strip_prefix("http://")).unwrap_or(registry);
    let host = host.split('/').next().unwrap_or(host);
    match host {
        "index.docker.io" | "registry-1.docker.io" => "docker.io".to_owned(),
        other => other.to_owned(),
    }
}

impl fmt::Debug for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Access").field("deadline", &self.deadline).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_credential_is_for_its_host_alone() {
        let mut keyring = Keyring::default();
        keyring.insert("https://index.docker.io/v1/", &"me:a:b".into()).unwrap();
        let Some(Credential::Password { username, password }) =
            keyring.credential("docker.io").await.unwrap()
        else {
            panic!("no credential")
        };
        assert_eq!((username.as_str(), password.expose_secret()), ("me", "a:b"));
        for other in ["docker.io.evil.test", "evil.test", "docker.io:5000", "DOCKER.IO"] {
            assert!(keyring.credential(other).await.unwrap().is_none(), "{other}");
        }
    }

    #[tokio::test]
    async fn a_login_is_read_as_it_is_written() {
        let mut keyring = Keyring::default();
        for credential in [
            Credential::Password { username: "me".into(), password: "a:b".into() },
            Credential::IdentityToken("refresh".into()),
        ] {
            keyring.insert("r.test", &credential.as_login().unwrap()).unwrap();
            let read = keyring.credential("r.test").await.unwrap().unwrap();
            assert_eq!(read.distinguishing(), credential.distinguishing());
        }
        assert!(Credential::RegistryToken("bearer".into()).as_login().is_none());
    }

    #[test]
    fn what_is_no_login_is_refused_without_being_shown() {
        for login in ["s3cret", ":s3cret"] {
            let error = Keyring::default().insert("r.io", &login.into()).unwrap_err();
            assert!(!format!("{error} {error:?}").contains("s3cret"));
        }
    }
}
