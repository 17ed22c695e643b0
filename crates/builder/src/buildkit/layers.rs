//! The layers of earlier builds, in a registry: asked for before a build. What a build leaves there is [`crate::export`]'s.
//!
//! BuildKit takes a layer only under the key of its step, which holds the digest of every image and file that it was made
//! of: a wrong cache makes a build slow, never wrong. One that can't be read at all is a build without.

use std::ffi::OsString;
use std::time::Duration;

use kiln_domain::failure::FailureReason;
use kiln_domain::layer_cache::CacheRefs;
use kiln_domain::reference::ImageReference;
use kiln_domain::run_folder::Settings;
use kiln_registry::{Access, Registry as _};
use secrecy::ExposeSecret as _;
use tokio::time::Instant;

use super::Buildkit;
use crate::export::Export;
use crate::tool::{BuildRequest, ToolError};

/// Words of a layer that is in the cache's list, and can't be had, or is another than that says.
const OF_LAYERS: [&str; 6] = [
    "failed to copy: ",
    "could not fetch content descriptor",
    "failed to load cache",
    "unexpected commit digest",
    "failed to extract layer",
    "failed to do request: Get ",
];

impl Buildkit {
    /// The caches that there are for a build. Who doesn't say so in time has none.
    pub(super) async fn imports(&self, cache: &CacheRefs) -> Vec<ImageReference> {
        let time = Duration::from_secs(self.settings.layer_cache.import_seconds);
        let access = Access {
            // It is read as it is written.
            keychain: self.access.to_push().clone(),
            push_keychain: None,
            deadline: (Instant::now() + time).min(self.access.deadline),
            patience: Duration::ZERO,
            insist_on: None,
            wait_out_limits: false,
        };
        let own = self.registry.digest(&cache.own, &access);
        let (own, default) = if cache.own == cache.default {
            (own.await, Ok(None))
        } else {
            tokio::join!(own, self.registry.digest(&cache.default, &access))
        };
        let mut found = Vec::new();
        for (reference, asked) in [(&cache.own, own), (&cache.default, default)] {
            match asked {
                Ok(Some(_)) => found.push(reference.clone()),
                Ok(None) => {}
                Err(error) => {
                    self.children.output().say(&format!(
                        "building without the layers of {reference}, which can't be asked for: {error}"
                    ));
                    break;
                }
            }
        }
        found
    }
}

impl Buildkit {
    /// What of a build that has succeeded is to be exported. None too where what was built can't be said in text.
    pub(super) fn to_export(
        &self,
        request: &BuildRequest,
        address: &str,
        arguments: &[OsString],
    ) -> Option<Export> {
        let CacheRefs { own, default, branch } = request.cache.clone()?;
        let arguments = arguments.iter().map(|argument| argument.clone().into_string().ok());
        let steps = self.children.output().steps();
        let login = self.logins.get(own.registry()).map(|login| login.expose_secret().to_owned());
        Some(Export {
            settings: Settings { registries: self.registries.clone(), ..self.settings.clone() },
            address: address.to_owned(),
            arguments: arguments.collect::<Option<_>>()?,
            own: own.to_string(),
            default: default.to_string(),
            branch,
            remote: request.repository.clone(),
            plain: self.registries.is_plain(own.registry()),
            login,
            nothing_new: steps.iter().all(|step| step.cached || step.name.starts_with("FROM ")),
        })
    }
}

/// Whether a build may have failed by the cache that it began with.
pub(super) fn may_be_at_fault(error: &ToolError, words: &str) -> bool {
    let of_layers = OF_LAYERS.iter().any(|text| words.contains(text));
    match error {
        ToolError::Lost(_) => false,
        ToolError::Refused { .. } => true,
        ToolError::Failed(failure) => {
            // What a step says of itself is its own: it ran.
            let ran = words.contains("no space left on device")
                || words.contains("did not complete successfully: ");
            !ran && (of_layers || failure.reason == FailureReason::RegistryUnavailable)
        }
    }
}
