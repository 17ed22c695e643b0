//! Making the target: a copy inside the registry, PUT only by a run that may still do so.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use kiln_domain::failure::{Failure, FailureReason};
use kiln_domain::platform::Platform;
use kiln_domain::reference::{Digest, ImageReference};
use kiln_domain::run::{RunSecrets, RunSpec};
use kiln_registry::{Access, Config, Error, Keyring, OciRegistry, Registry};
use secrecy::SecretString;
use tokio::time::Instant;

use crate::folder::Folder;
use crate::lock::push_lock;

/// How long a registry other than the target's may be out of reach.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

/// Makes the target of a run.
pub(crate) struct Target<'a> {
    folder: &'a Folder,
    spec: &'a RunSpec,
    registry: OciRegistry,
    access: Access,
}

impl<'a> Target<'a> {
    /// Gives up at `deadline`; until then it insists on the target's registry.
    pub(crate) fn new(
        folder: &'a Folder,
        spec: &'a RunSpec,
        secrets: &RunSecrets,
        deadline: Instant,
    ) -> Result<Self, Failure> {
        let (registry, access) = registry(spec, secrets, deadline)?;
        Ok(Self { folder, spec, registry, access })
    }

    /// Makes the target the same image as `from`.
    pub(crate) async fn copy(&self, from: &ImageReference, platform: &Platform) -> Result<Digest, Failure> {
        self.copy_as(&self.access, from, platform).await
    }

    /// The same, of what this run has pushed: it is read with the credentials that it was pushed with.
    pub(crate) async fn copy_own(
        &self,
        from: &ImageReference,
        platform: &Platform,
    ) -> Result<Digest, Failure> {
        let mut access = self.access.clone();
        if let Some(keychain) = &access.push_keychain {
            access.keychain = keychain.clone();
        }
        self.copy_as(&access, from, platform).await
    }

    async fn copy_as(
        &self,
        access: &Access,
        from: &ImageReference,
        platform: &Platform,
    ) -> Result<Digest, Failure> {
        let to = &self.spec.target_ref;
        let mut push: Option<File> = None;
        let mut before_put = |digest: &Digest| {
            if push.is_none() {
                push = Some(push_lock(self.folder.path())?);
            }
            // From here on whoever revokes the run waits until the PUT is over; who revoked it before is seen here.
            if self.folder.is_revoked() {
                return Err(io::Error::other("the run was revoked"));
            }
            if self.folder.is_cancelled() {
                return Err(io::Error::other("the build was cancelled"));
            }
            self.folder.record_target(digest)
        };
        let copied = self.registry.copy(from, to, platform, access, &mut before_put).await;
        drop(push);
        copied.map_err(|error| failure(&error, from, to))
    }

    /// The digest of what a reference points at now, where that can be told.
    pub(crate) async fn digest(&self, reference: &ImageReference) -> Option<Digest> {
        self.registry.digest(reference, &self.access).await.ok().flatten()
    }
}

/// Registries as a run asks them: with its credentials alone, until `deadline`.
pub(crate) fn registry(
    spec: &RunSpec,
    secrets: &RunSecrets,
    deadline: Instant,
) -> Result<(OciRegistry, Access), Failure> {
    kiln_registry::install_crypto_provider();
    let to_pull = keyring(secrets.registries.iter())?;
    let to_push = keyring(secrets.registries.iter().chain(&secrets.push))?;
    let mut access = Access::new(Arc::new(to_pull), deadline);
    access.push_keychain = Some(Arc::new(to_push));
    access.patience = PATIENCE;
    access.insist_on = Some(spec.target_ref.registry().to_owned());
    access.wait_out_limits = true;
    let config = Config { plain_http: spec.plain_http.clone(), ..Config::default() };
    Ok((OciRegistry::new(config), access))
}

/// Of two logins for a host, the later one counts.
fn keyring<'a>(logins: impl Iterator<Item = (&'a String, &'a SecretString)>) -> Result<Keyring, Failure> {
    let mut keyring = Keyring::default();
    for (host, login) in logins {
        keyring
            .insert(host, login)
            .map_err(|error| Failure::new(FailureReason::RegistryDenied, error.to_string()))?;
    }
    Ok(keyring)
}

pub(crate) fn failure(error: &Error, from: &ImageReference, to: &ImageReference) -> Failure {
    let reason = match error {
        Error::Unauthenticated { .. } | Error::Denied { .. } => FailureReason::RegistryDenied,
        Error::NoCredential { .. }
        | Error::Limited { .. }
        | Error::Unavailable { .. }
        | Error::UnknownHost { .. } => FailureReason::RegistryUnavailable,
        // The image is the user's choice.
        Error::NotFound { .. } | Error::NoPlatform { .. } | Error::Unsupported { .. } => {
            FailureReason::Context
        }
        Error::Broken { .. } | Error::Rejected { .. } | Error::Stopped(_) => FailureReason::Internal,
    };
    let told = match error {
        Error::Stopped(source) => format!("{error}: {source}"),
        other => other.to_string(),
    };
    Failure::new(reason, format!("cannot make `{to}` from `{from}`: {told}"))
}
