//! Which image a reference or a source is, without building anything.

use kiln_contract::error::Refusal;
use kiln_contract::orchestrator as ask;
use kiln_contract::resolver::ResolveImage;
use kiln_contract::secrets::{RegistryAuth, Secrets};
use kiln_domain::reference::{ImageReference, InvalidReference};
use kiln_domain::source::Source;
use kiln_proto::builder as api;
use tonic::Status;

use crate::builds::PATIENCE;
use crate::compat::ImageBuilderApi;
use crate::compat::auth::registry_auth;
use crate::compat::source::{Given, given};
use crate::status;

/// A source that has its name, and everything that a question about it needs.
pub(crate) struct Named {
    pub(crate) source: Source,
    pub(crate) clone_target: String,
    pub(crate) secrets: Secrets,
    /// Why a builder of ours could not fetch it.
    pub(crate) unfetchable: Option<&'static str>,
}

impl ImageBuilderApi {
    pub(crate) async fn base_image(
        &self,
        request: api::ResolveBaseImageRequest,
    ) -> Result<api::ResolveBaseImageResponse, Status> {
        let auth = registry_auth(request.auth, &self.builds.config, false)?;
        let reference = self.pin(&request.r#ref, &auth).await?;
        Ok(api::ResolveBaseImageResponse { r#ref: reference.to_string() })
    }

    pub(crate) async fn workspace_image(
        &self,
        request: api::ResolveWorkspaceImageRequest,
    ) -> Result<api::ResolveWorkspaceImageResponse, Status> {
        let given = given(request.source)?;
        let auth = registry_auth(request.auth, &self.builds.config, false)?;
        let named = self.name(given, auth).await?;
        let answer =
            self.ask_for(&named.source, &named.clone_target).await.map_err(|error| status::of(&error))?;
        let status = if answer.exists { api::BuildStatus::DoneSuccess } else { api::BuildStatus::Unknown };
        Ok(api::ResolveWorkspaceImageResponse {
            r#ref: answer.target_ref,
            status: status.into(),
            base_ref: answer.base_ref,
        })
    }

    /// An image by its digest; a Dockerfile as it is.
    pub(crate) async fn name(&self, given: Given, auth: RegistryAuth) -> Result<Named, Status> {
        Ok(match given {
            Given::Image(reference) => Named {
                source: Source::Image(self.pin(&reference, &auth).await?),
                clone_target: String::new(),
                secrets: Secrets { registry: auth, ..Secrets::default() },
                unfetchable: None,
            },
            Given::Dockerfile(dockerfile) => Named {
                source: Source::Dockerfile(dockerfile.source),
                clone_target: dockerfile.clone_target,
                secrets: Secrets { registry: auth, ..dockerfile.secrets },
                unfetchable: dockerfile.unfetchable,
            },
        })
    }

    /// Which image a source that has its name makes, and whether it is there.
    pub(crate) async fn ask_for(
        &self,
        source: &Source,
        clone_target: &str,
    ) -> Result<ask::WorkspaceImageAnswer, Refusal> {
        let question = ask::WorkspaceImage {
            source: ask::source_to_json(source)?,
            clone_target: Some(clone_target.to_owned()),
            ..Default::default()
        };
        self.builds.asker.ask(&question, PATIENCE).await
    }

    /// `name@digest` of an image for linux/amd64.
    async fn pin(&self, reference: &str, auth: &RegistryAuth) -> Result<ImageReference, Status> {
        let reference: ImageReference = reference.parse().map_err(|error| unparsable(&error))?;
        let secrets = Secrets { registry: auth.clone(), ..Secrets::default() };
        let question = ResolveImage {
            reference: reference.to_string(),
            platform: String::new(),
            secrets: self.builds.seal(&secrets)?,
            refresh: false,
        };
        // The resolver's texts begin as mk3's do.
        let answer = self.builds.asker.ask(&question, PATIENCE).await.map_err(|error| status::of(&error))?;
        answer.reference.parse().map_err(|error| {
            Status::internal(format!("cannot resolve image: the answer can't be read: {error}"))
        })
    }
}

/// mk3's own words, its spelling included: clients cut this beginning off.
fn unparsable(error: &InvalidReference) -> Status {
    let error = error.to_string();
    let problem = error.strip_prefix("cannot parse image ref ").unwrap_or(&error);
    Status::invalid_argument(format!("cannt resolve base image ref: cannot parse image ref: {problem}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reference_that_does_not_parse_is_refused_in_mk3s_words() {
        for text in ["UPPER/x", "https://host/x", "a b", "a\0", "", &"0".repeat(64), &"a".repeat(5000)] {
            let status = unparsable(&text.parse::<ImageReference>().unwrap_err());
            assert_eq!(status.code(), tonic::Code::InvalidArgument);
            let beginning = "cannt resolve base image ref: cannot parse image ref: ";
            assert!(status.message().starts_with(beginning), "{}", status.message());
        }
    }
}
