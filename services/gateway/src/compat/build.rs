//! Build: finds the image, or begins its build or joins it, and tells how it goes on.

use futures::stream;
use kiln_contract::error::{Code, Refusal};
use kiln_contract::orchestrator as ask;
use kiln_domain::reference::ImageReference;
use kiln_domain::source::{Source, check_text};
use kiln_proto::builder as api;
use tonic::Status;

use crate::builds::{Answers, PATIENCE};
use crate::compat::ImageBuilderApi;
use crate::compat::auth::registry_auth;
use crate::compat::follow::follow;
use crate::compat::source::given;
use crate::status;

/// What a client is told while an orchestrator, a registry or the bus can't be asked. It tries again at UNAVAILABLE.
const UNAVAILABLE: &str = "workspace services are currently unavailable";

impl ImageBuilderApi {
    pub(crate) async fn built(
        &self,
        request: api::BuildRequest,
    ) -> Result<Answers<api::BuildResponse>, Status> {
        let given = given(request.source)?;
        check_text("triggered_by", &request.triggered_by)
            .map_err(|error| Status::invalid_argument(error.to_string()))?;
        let resolved = request.base_image_name_resolved.as_str();
        let auth = registry_auth(request.auth, &self.builds.config, !resolved.is_empty())?;
        if !resolved.is_empty()
            && !request.force_rebuild
            && let Some(built) = self.built_of_base(resolved).await?
        {
            return Ok(only(built));
        }
        let mut named = self.name(given, auth).await?;
        named.secrets.workspace.get_or_insert_default().supervisor_ref = request.supervisor_ref;
        let question = ask::Build {
            request_id: format!("{:032x}", rand::random::<u128>()),
            source: ask::source_to_json(&named.source).map_err(|error| not_started(&error))?,
            secrets: self.builds.seal(&named.secrets)?,
            force: request.force_rebuild,
            owner: request.triggered_by,
            clone_target: Some(named.clone_target),
            unfetchable: named.unfetchable.unwrap_or_default().to_owned(),
            ..Default::default()
        };
        let answer =
            self.builds.asker.ask_to_write(&question, PATIENCE).await.map_err(|error| not_started(&error))?;
        match (answer.build, answer.already_built) {
            (Some(build), _) => {
                let record = build.record().map_err(|error| not_started(&error))?;
                Ok(follow(&self.builds, &self.log_infos, &record))
            }
            (None, Some(built)) => Ok(only(found(built.target_ref, built.base_ref))),
            (None, None) => Err(Status::internal(
                "cannot start build: the orchestrator answered with neither build nor image",
            )),
        }
    }

    /// The workspace image of a base image that an earlier answer named, if it is there: nothing else is asked then.
    async fn built_of_base(&self, resolved: &str) -> Result<Option<api::BuildResponse>, Status> {
        let base: ImageReference = match resolved.parse() {
            Ok(base) => base,
            Err(error) => {
                tracing::warn!("base_image_name_resolved is ignored: {error}");
                return Ok(None);
            }
        };
        let answer = self.ask_for(&Source::Image(base), "").await.map_err(|error| not_started(&error))?;
        Ok(answer.exists.then(|| found(answer.target_ref, answer.base_ref)))
    }
}

/// A stream of one message.
fn only(response: api::BuildResponse) -> Answers<api::BuildResponse> {
    Box::pin(stream::once(async { Ok(response) }))
}

/// An image that need not be built.
fn found(target_ref: String, base_ref: String) -> api::BuildResponse {
    api::BuildResponse {
        r#ref: target_ref,
        status: api::BuildStatus::DoneSuccess.into(),
        base_ref,
        ..Default::default()
    }
}

/// Why no build was begun. The base image was resolved before: a registry that is in trouble now is the installation's, and
/// what is wrong with the request is its git repository, which Gitpod's server has to take for the user's mistake.
fn not_started(refusal: &Refusal) -> Status {
    let why = refusal.message.strip_prefix("cannot resolve image: ").unwrap_or(&refusal.message);
    let message = match refusal.code {
        Code::Unavailable | Code::DeadlineExceeded => format!("{UNAVAILABLE}: {why}"),
        Code::InvalidArgument | Code::NotFound | Code::Unauthenticated | Code::PermissionDenied => {
            format!("cannot start build: headless task failed: {why}")
        }
        Code::ResourceExhausted
        | Code::FailedPrecondition
        | Code::Aborted
        | Code::OutOfRange
        | Code::Internal => format!("cannot start build: {why}"),
    };
    let code = match refusal.code {
        Code::DeadlineExceeded => Code::Unavailable,
        code => code,
    };
    status::of(&Refusal { code, message })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn why_no_build_was_begun() {
        for (code, message, expected_code, expected) in [
            (
                Code::Unavailable,
                "cannot resolve image: r.test can't be asked",
                tonic::Code::Unavailable,
                "workspace services are currently unavailable: r.test can't be asked",
            ),
            (
                Code::NotFound,
                "source.dockerfile.git.remote_uri: there is no such repository",
                tonic::Code::NotFound,
                "cannot start build: headless task failed: source.dockerfile.git.remote_uri: there is no such repository",
            ),
            (
                Code::ResourceExhausted,
                "the queue is full: 3 builds wait",
                tonic::Code::ResourceExhausted,
                "cannot start build: the queue is full: 3 builds wait",
            ),
        ] {
            let status = not_started(&Refusal::new(code, message));
            assert_eq!((status.code(), status.message()), (expected_code, expected));
        }
    }
}
