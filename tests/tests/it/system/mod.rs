//! The whole of Kiln, from the gRPC API to the registry and back.

mod bad_input;
mod buildkit;
mod fleet;
pub(crate) mod image_builder;
mod main_job;
mod registries;
mod restart;
mod secrets;

use anyhow::{Context as _, Result};
use kiln_proto::kiln_v1 as api;
use kiln_testkit::installation::{Installation, program};
use kiln_testkit::workshop::Workshop;

pub(crate) const DOCKERFILE: &str = "\
FROM scratch
COPY busybox /bin/busybox
RUN [\"/bin/busybox\", \"echo\", \"hello from the build\"]
";

/// A Kiln and a place for repositories.
pub(crate) struct Stage {
    pub(crate) kiln: Installation,
    pub(crate) workshop: Workshop,
}

impl Stage {
    pub(crate) async fn set() -> Result<Self> {
        Self::set_with(&[]).await
    }

    /// With these arguments of `kiln up`.
    pub(crate) async fn set_with(arguments: &[&str]) -> Result<Self> {
        let (kiln, workshop) =
            tokio::try_join!(async { Installation::start(&program()?, arguments).await }, Workshop::new(),)?;
        Ok(Self { kiln, workshop })
    }

    /// Asks for a build.
    pub(crate) async fn ask(
        &self,
        request: api::BuildImageRequest,
    ) -> Result<api::BuildImageResponse, tonic::Status> {
        let mut client =
            self.kiln.client().await.map_err(|error| tonic::Status::unknown(error.to_string()))?;
        Ok(client.build_image(request).await?.into_inner())
    }

    /// Begins a build of a repository's Dockerfile.
    pub(crate) async fn begin(&self, uri: &str) -> Result<api::Build> {
        begun(self.ask(dockerfile(uri, |_| {})).await?)
    }
}

/// A request to build a repository's Dockerfile.
pub(crate) fn dockerfile(uri: &str, change: impl FnOnce(&mut api::Dockerfile)) -> api::BuildImageRequest {
    let mut dockerfile = api::Dockerfile {
        git: Some(api::GitContext { remote_uri: uri.into(), ..Default::default() }),
        ..Default::default()
    };
    change(&mut dockerfile);
    let source = api::Source { from: Some(api::source::From::Dockerfile(dockerfile)) };
    api::BuildImageRequest { source: Some(source), owner: "ann".into(), ..Default::default() }
}

pub(crate) fn image(reference: &str) -> api::BuildImageRequest {
    let source = api::Source { from: Some(api::source::From::Image(reference.into())) };
    api::BuildImageRequest { source: Some(source), ..Default::default() }
}

/// The build of an answer.
pub(crate) fn begun(answer: api::BuildImageResponse) -> Result<api::Build> {
    match answer.outcome.context("an outcome")? {
        api::build_image_response::Outcome::Build(build) => Ok(build),
        other => anyhow::bail!("no build: {other:?}"),
    }
}

pub(crate) fn is_over(build: &api::Build) -> bool {
    !matches!(build.state(), api::BuildState::Queued | api::BuildState::Running)
}
