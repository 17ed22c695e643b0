//! Which image a source makes.

use bytes::Bytes;
use kiln_contract::error::{Code, Refusal};
use kiln_domain::hash;
use kiln_domain::reference::ImageReference;
use kiln_domain::source::{DockerfileSource, Source};

use crate::Shared;

/// The image that a source makes.
pub(crate) struct Identity {
    pub(crate) base_ref: ImageReference,
    pub(crate) target_ref: ImageReference,
    /// Of a Dockerfile from git, where the image is named by it.
    pub(crate) commit: Option<String>,
}

impl Shared {
    /// Asks what the source is right now, and names its image. A revision becomes its commit; an image its digest.
    /// With a `clone_target` nothing is asked: the image is named as mk3 names it.
    pub(crate) async fn identify(
        &self,
        source: &Source,
        clone_target: Option<&str>,
        secrets: &Bytes,
    ) -> Result<Identity, Refusal> {
        let newer = || {
            let message = "source: is of a newer release than the orchestrator that was asked; ask again";
            Refusal::new(Code::Unavailable, message)
        };
        if !source.is_known() {
            return Err(newer());
        }
        let (base_ref, commit) = match source {
            Source::Unknown(_) => return Err(newer()),
            Source::Image(reference) if clone_target.is_some() => (reference.clone(), None),
            Source::Image(reference) => {
                let pinned = self.resolver.pin(reference, secrets).await;
                let named = |refusal: Refusal| Refusal {
                    message: format!("source.image: {}", refusal.message),
                    ..refusal
                };
                (pinned.map_err(named)?, None)
            }
            Source::Dockerfile(dockerfile) => {
                let commit = match clone_target {
                    Some(_) => None,
                    None => Some(self.commit(dockerfile, secrets).await?),
                };
                let named = clone_target.or(commit.as_deref()).unwrap_or_default();
                let base_ref = hash::base_ref(&self.config.base_image_repository, dockerfile, named);
                (ours(&base_ref)?, commit)
            }
        };
        let target_ref = hash::workspace_ref(&self.config.workspace_image_repository, &base_ref.to_string());
        Ok(Identity { target_ref: ours(&target_ref)?, base_ref, commit })
    }

    /// The commit that a source's revision is now, if all of the source can be taken.
    pub(crate) async fn commit(
        &self,
        dockerfile: &DockerfileSource,
        secrets: &Bytes,
    ) -> Result<String, Refusal> {
        dockerfile.check(self.config.file_remotes)?;
        self.resolver.commit(dockerfile, secrets).await
    }
}

/// A reference that we made of a configured repository, which was checked at start.
fn ours(reference: &str) -> Result<ImageReference, Refusal> {
    reference
        .parse()
        .map_err(|error| Refusal::new(Code::Internal, format!("a repository is configured wrong: {error}")))
}
