//! `builder.ImageBuilder`: the API of Gitpod's image-builder-mk3, for the clients that it has.
//!
//! Its calls become the same questions as those of `kiln.v1.Builds`, so that both see the same builds. What its clients go
//! by is kept to the byte: status codes, beginnings of texts, the order of a stream's messages. A build is named by what
//! the request says, as mk3 named it, and not by the commit behind it.

mod auth;
mod build;
mod follow;
mod handled;
mod info;
mod list;
mod log_info;
mod logs;
mod resolve;
mod source;

use std::sync::Arc;

use kiln_bus::seal::SealError;
use kiln_proto::builder as api;
use kiln_proto::builder::image_builder_server::ImageBuilder;
use tonic::{Request, Response, Status};

use crate::builds::{Answers, BuildsApi};
pub(crate) use crate::compat::handled::Handled;
use crate::compat::log_info::LogInfos;

/// The service behind `builder.ImageBuilder`.
pub(crate) struct ImageBuilderApi {
    builds: Arc<BuildsApi>,
    log_infos: LogInfos,
    handled: Handled,
}

impl ImageBuilderApi {
    pub(crate) fn new(builds: Arc<BuildsApi>, handled: Handled) -> Result<Self, SealError> {
        let log_infos = LogInfos::new(builds.asker.clone())?;
        Ok(Self { builds, log_infos, handled })
    }
}

#[tonic::async_trait]
impl ImageBuilder for ImageBuilderApi {
    type BuildStream = Answers<api::BuildResponse>;
    type LogsStream = Answers<api::LogsResponse>;

    async fn resolve_base_image(
        &self,
        request: Request<api::ResolveBaseImageRequest>,
    ) -> Result<Response<api::ResolveBaseImageResponse>, Status> {
        let answer = self
            .builds
            .metrics
            .call("ImageBuilder/ResolveBaseImage", request, |request| self.base_image(request));
        self.handled.unary("ResolveBaseImage", answer.await)
    }

    async fn resolve_workspace_image(
        &self,
        request: Request<api::ResolveWorkspaceImageRequest>,
    ) -> Result<Response<api::ResolveWorkspaceImageResponse>, Status> {
        let answer = self
            .builds
            .metrics
            .call("ImageBuilder/ResolveWorkspaceImage", request, |request| self.workspace_image(request));
        self.handled.unary("ResolveWorkspaceImage", answer.await)
    }

    async fn build(
        &self,
        request: Request<api::BuildRequest>,
    ) -> Result<Response<Self::BuildStream>, Status> {
        let answer = self.builds.metrics.call("ImageBuilder/Build", request, |request| self.built(request));
        self.handled.stream("Build", answer.await)
    }

    async fn logs(&self, request: Request<api::LogsRequest>) -> Result<Response<Self::LogsStream>, Status> {
        let answer = self.builds.metrics.call("ImageBuilder/Logs", request, |request| self.log(request));
        self.handled.stream("Logs", answer.await)
    }

    async fn list_builds(
        &self,
        request: Request<api::ListBuildsRequest>,
    ) -> Result<Response<api::ListBuildsResponse>, Status> {
        let answer = self.builds.metrics.call("ImageBuilder/ListBuilds", request, |_| self.listed());
        self.handled.unary("ListBuilds", answer.await)
    }
}
