//! Making the target: a copy inside the registry, PUT only by a run that may still do so.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use kiln_domain::failure::{Failure, FailureReason};
use kiln_domain::platform::Platform;
use kiln_domain::reference::{Digest, ImageReference};
use kiln_domain::registries::Registries;
use kiln_domain::run::{BuiltImage, RunSecrets, RunSpec};
use kiln_domain::run_folder::Settings;
use kiln_registry::{Access, Config, Error, Keyring, OciRegistry, Registry};
use secrecy::SecretString;
use tokio::time::Instant;

use crate::folder::Folder;
use crate::lock::push_lock;
use crate::put::Put;

/// How long a registry other than the target's may be out of reach.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

/// Makes the target of a run.
pub(crate) struct Target<'a> {
    folder: &'a Folder,
    spec: &'a RunSpec,
    registries: Registries,
    registry: OciRegistry,
    access: Access,
    put: &'a Put,
}

impl<'a> Target<'a> {
    /// Gives up at `deadline`; until then it insists on the target's registry.
    pub(crate) fn new(
        folder: &'a Folder,
        spec: &'a RunSpec,
        secrets: &RunSecrets,
        settings: &Settings,
        deadline: Instant,
        put: &'a Put,
    ) -> Result<Self, Failure> {
        let registries = registries(spec, settings);
        let (registry, access) = registry(spec, secrets, &registries, deadline)?;
        Ok(Self { folder, spec, registries, registry, access, put })
    }

    /// Makes the target the same image as `from`, taken from the first of its mirrors that has it, or else from where it is.
    pub(crate) async fn copy(
        &self,
        from: &ImageReference,
        platform: Option<&Platform>,
        say: impl Fn(&str),
    ) -> Result<Digest, Failure> {
        let access = for_mirrors(&self.access);
        for mirror in self.registries.mirrored(from) {
            say(&format!("taking it from the mirror's {mirror}"));
            match self.copy_as(&access, &mirror, platform).await {
                Ok(digest) => return Ok(digest),
                Err(error @ Error::Stopped(_)) => {
                    return Err(failure(&error, &mirror, &self.spec.target_ref));
                }
                Err(error) => say(&format!("not from the mirror: {error}")),
            }
        }
        let copied = self.copy_as(&self.access, from, platform).await;
        copied.map_err(|error| failure(&error, from, &self.spec.target_ref))
    }

    /// The same, of what this run has pushed: it is read with the credentials that it was pushed with.
    pub(crate) async fn copy_own(&self, from: &ImageReference) -> Result<Digest, Failure> {
        let access = Access { keychain: self.access.to_push().clone(), ..self.access.clone() };
        let copied = self.copy_as(&access, from, None).await;
        copied.map_err(|error| failure(&error, from, &self.spec.target_ref))
    }

    async fn copy_as(
        &self,
        access: &Access,
        from: &ImageReference,
        platform: Option<&Platform>,
    ) -> Result<Digest, Error> {
        let to = &self.spec.target_ref;
        let mut before_put = |digest: &Digest| -> io::Result<Box<dyn Send>> {
            let attempt = self.put.begin()?;
            let push = push_lock(self.folder.path())?;
            // From here on whoever revokes the run waits until the PUT is over; who revoked it before is seen here.
            if self.folder.is_revoked() {
                return Err(io::Error::other("the run was revoked"));
            }
            if self.folder.is_cancelled() {
                return Err(io::Error::other("the build was cancelled"));
            }
            self.folder.record_target(digest)?;
            Ok(Box::new((push, attempt)))
        };
        self.registry.copy(from, to, platform, access, &mut before_put).await
    }

    /// What lies at the target, by platform; nothing where that can't be told. `alone`: what a single image is for.
    pub(crate) async fn images(&self, digest: &Digest, alone: &Platform) -> Vec<BuiltImage> {
        let mut access = for_mirrors(&self.access);
        if let Some(keychain) = access.push_keychain.take() {
            access.keychain = keychain;
        }
        let images = self.registry.images(&self.spec.target_ref.pinned(digest), &access).await;
        let built = |image: kiln_registry::Sized| BuiltImage {
            platform: image.platform.unwrap_or_else(|| alone.clone()),
            digest: image.digest,
            bytes: image.bytes,
        };
        images.unwrap_or_default().into_iter().map(built).collect()
    }

    /// The digest of what a reference points at now, where that can be told.
    pub(crate) async fn digest(&self, reference: &ImageReference) -> Option<Digest> {
        digest(&self.registry, &self.registries, reference, &self.access).await.ok().flatten()
    }
}

/// The digest of what a reference points at: by the first of its mirrors that has it, or else where it is.
pub(crate) async fn digest(
    registry: &dyn Registry,
    registries: &Registries,
    reference: &ImageReference,
    access: &Access,
) -> Result<Option<Digest>, Error> {
    let at_once = for_mirrors(access);
    for mirror in registries.mirrored(reference) {
        if let Ok(Some(digest)) = registry.digest(&mirror, &at_once).await {
            return Ok(Some(digest));
        }
    }
    registry.digest(reference, access).await
}

/// A mirror that does not answer at once is passed over: others are asked after it.
fn for_mirrors(access: &Access) -> Access {
    Access { patience: Duration::ZERO, wait_out_limits: false, ..access.clone() }
}

/// How this run reaches registries.
pub(crate) fn registries(spec: &RunSpec, settings: &Settings) -> Registries {
    let mut registries = settings.registries.clone();
    registries.plain(spec.plain_http.iter().cloned());
    registries
}

/// Registries as a run asks them: with its credentials alone, until `deadline`.
pub(crate) fn registry(
    spec: &RunSpec,
    secrets: &RunSecrets,
    registries: &Registries,
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
    let on_behalf_of = Some(format!("run {}", spec.run));
    let config = Config { registries: registries.clone(), on_behalf_of, ..Config::default() };
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
