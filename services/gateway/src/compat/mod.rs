//! `builder.ImageBuilder`: the API of Gitpod's image-builder-mk3, for the clients that it has.
//!
//! Its calls become the same questions as those of `kiln.v1.Builds`, so that both see the same builds. What its clients go
//! by is kept to the byte: status codes, beginnings of texts, the order of a stream's messages. A build is named by what
//! the request says, as mk3 named it, and not by the commit behind it.

mod auth;
mod build;
mod follow;
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
use crate::compat::log_info::LogInfos;

/// The service behind `builder.ImageBuilder`.
pub(crate) struct ImageBuilderApi {
    builds: Arc<BuildsApi>,
    log_infos: LogInfos,
}

impl ImageBuilderApi {
    pub(crate) fn new(builds: Arc<BuildsApi>) -> Result<Self, SealError> {
        let log_infos = LogInfos::new(builds.bus.clone())?;
        Ok(Self { builds, log_infos })
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
        let metrics = &self.builds.metrics;
        metrics.call("ImageBuilder/ResolveBaseImage", request, |request| self.base_image(request)).await
    }

    async fn resolve_workspace_image(
        &self,
        request: Request<api::ResolveWorkspaceImageRequest>,
    ) -> Result<Response<api::ResolveWorkspaceImageResponse>, Status> {
        let metrics = &self.builds.metrics;
        metrics
            .call("ImageBuilder/ResolveWorkspaceImage", request, |request| self.workspace_image(request))
            .await
    }

    async fn build(
        &self,
        request: Request<api::BuildRequest>,
    ) -> Result<Response<Self::BuildStream>, Status> {
        self.builds.metrics.call("ImageBuilder/Build", request, |request| self.built(request)).await
    }

    async fn logs(&self, request: Request<api::LogsRequest>) -> Result<Response<Self::LogsStream>, Status> {
        self.builds.metrics.call("ImageBuilder/Logs", request, |request| self.log(request)).await
    }

    async fn list_builds(
        &self,
        request: Request<api::ListBuildsRequest>,
    ) -> Result<Response<api::ListBuildsResponse>, Status> {
        self.builds.metrics.call("ImageBuilder/ListBuilds", request, |_| self.listed()).await
    }
}
