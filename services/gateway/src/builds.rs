//! `kiln.v1.Builds`: each call becomes a question, a read of the view, or a read of the log.

use std::pin::Pin;
use std::time::Duration;

use bytes::Bytes;
use futures::{Stream, StreamExt as _, stream};
use kiln_bus::journal::{Entry, Journal};
use kiln_bus::logs::Start;
use kiln_bus::seal::SealKey;
use kiln_bus::view::View;
use kiln_contract::cache_warmer::ListWarm;
use kiln_contract::orchestrator as ask;
use kiln_contract::resolver::ResolveImage;
use kiln_contract::secrets::{RegistryAuth, Secrets};
use kiln_domain::id::BuildId;
use kiln_domain::platform::Platform;
use kiln_domain::record::State;
use kiln_domain::reference::ImageReference;
use kiln_domain::source::check_text;
use kiln_proto::kiln_v1 as api;
use kiln_proto::kiln_v1::builds_server::Builds;
use tonic::{Request, Response, Status};

use crate::ask::Asker;
use crate::config::Config;
use crate::cut::Cuts;
use crate::list::Query;
use crate::log::{BuildLogs, ReadError};
use crate::queue::Queue;
use crate::resolved::Resolved;
use crate::rpc::Metrics;
use crate::steps::Steps;
use crate::{convert, request, status};

/// How long a question that asks a registry or git remote may take; one that doesn't answers in milliseconds.
pub(crate) const PATIENCE: Duration = Duration::from_secs(50);
/// How long a call waits until the gateway's own view has what the answer says.
pub(crate) const OWN_VIEW: Duration = Duration::from_secs(1);

/// Running builds of a page whose steps are asked for at once, where no step was told since this gateway began.
const STEPS_AT_ONCE: usize = 32;

/// The service behind `kiln.v1.Builds`.
pub(crate) struct BuildsApi {
    pub(crate) config: Config,
    pub(crate) asker: Asker,
    pub(crate) view: View,
    pub(crate) build_logs: BuildLogs,
    pub(crate) steps: Steps,
    pub(crate) queue: Queue,
    pub(crate) journal: Journal,
    pub(crate) cuts: Cuts,
    pub(crate) seal_key: SealKey,
    pub(crate) metrics: Metrics,
    pub(crate) resolved: Resolved,
}

pub(crate) type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Builds for BuildsApi {
    type WatchBuildStream = Answers<api::Build>;
    type BuildLogsStream = Answers<api::LogChunk>;

    async fn build_image(
        &self,
        request: Request<api::BuildImageRequest>,
    ) -> Result<Response<api::BuildImageResponse>, Status> {
        self.metrics.call("BuildImage", request, |request| self.build(request)).await
    }

    async fn build_status(
        &self,
        request: Request<api::BuildStatusRequest>,
    ) -> Result<Response<api::Build>, Status> {
        self.metrics
            .call("BuildStatus", request, async |request| {
                let entry = self.entry(&request::build_id(&request.id)?).await?;
                Ok(self.shown(&entry).await)
            })
            .await
    }

    async fn watch_build(
        &self,
        request: Request<api::WatchBuildRequest>,
    ) -> Result<Response<Self::WatchBuildStream>, Status> {
        self.metrics
            .call("WatchBuild", request, async |request| {
                let entry = self.entry(&request::build_id(&request.id)?).await?;
                Ok(self.watch(entry).await)
            })
            .await
    }

    async fn build_logs(
        &self,
        request: Request<api::BuildLogsRequest>,
    ) -> Result<Response<Self::BuildLogsStream>, Status> {
        self.metrics.call("BuildLogs", request, |request| self.log(request)).await
    }

    async fn build_log_info(
        &self,
        request: Request<api::BuildLogInfoRequest>,
    ) -> Result<Response<api::LogInfo>, Status> {
        self.metrics
            .call("BuildLogInfo", request, async |request| {
                let log = self.build_logs.open(&request::build_id(&request.id)?).await;
                let log = log.map_err(status::of_read)?;
                let info = log.info().await.map_err(status::of_read)?;
                Ok(convert::log_info(log.id(), &info))
            })
            .await
    }

    async fn list_builds(
        &self,
        request: Request<api::ListBuildsRequest>,
    ) -> Result<Response<api::ListBuildsResponse>, Status> {
        self.metrics
            .call("ListBuilds", request, async |request| {
                let query = Query::new(request)?;
                self.cuts.presence.check().await.map_err(status::of_bus)?;
                if !self.view.is_caught_up() {
                    return Err(Status::unavailable(
                        "this gateway is still reading what there is; ask again",
                    ));
                }
                let mut found = self.view.newest(query.before, |entry| query.wants(entry), query.limit + 1);
                let more = found.len() > query.limit;
                found.truncate(query.limit);
                let next_page_token = match found.last() {
                    Some((place, _)) if more => query.token(*place),
                    _ => String::new(),
                };
                let shown = found.into_iter().map(async |(_, entry)| self.shown(&entry).await);
                let builds = stream::iter(shown).buffered(STEPS_AT_ONCE).collect().await;
                Ok(api::ListBuildsResponse { builds, next_page_token })
            })
            .await
    }

    async fn cancel_build(
        &self,
        request: Request<api::CancelBuildRequest>,
    ) -> Result<Response<api::Build>, Status> {
        self.metrics
            .call("CancelBuild", request, async |request| {
                let id = request::build_id(&request.id)?;
                check_text("reason", &request.reason)
                    .map_err(|error| Status::invalid_argument(error.to_string()))?;
                let question = ask::Cancel { build_id: id.to_string(), reason: request.reason };
                let answer =
                    self.asker.ask_to_write(&question, PATIENCE).await.map_err(|error| status::of(&error))?;
                self.build_of(answer).await
            })
            .await
    }

    async fn resolve_base_image(
        &self,
        request: Request<api::ResolveBaseImageRequest>,
    ) -> Result<Response<api::ResolveBaseImageResponse>, Status> {
        self.metrics
            .call("ResolveBaseImage", request, async |request| {
                let reference: ImageReference =
                    request.r#ref.parse().map_err(|error| status::invalid("ref", error))?;
                let platform = match request.platform.as_str() {
                    "" => Platform::default(),
                    text => text.parse().map_err(|error| status::invalid("platform", error))?,
                };
                let registry = request::registry_auth(request.auth)?;
                let asked = (reference.to_string(), platform.to_string());
                let for_all = registry == RegistryAuth::default();
                if for_all
                    && !request.refresh
                    && let Some(answer) = self.resolved.get(&asked).await
                {
                    return Ok(convert::resolved_image(answer, &platform));
                }
                let secrets = Secrets { registry, ..Secrets::default() };
                let question = ResolveImage {
                    reference: asked.0.clone(),
                    platform: request.platform,
                    secrets: self.seal(&secrets)?,
                    refresh: request.refresh,
                };
                let answer = self.asker.ask(&question, PATIENCE).await.map_err(|mut refusal| {
                    refusal.message.insert_str(0, "ref: ");
                    status::of(&refusal)
                })?;
                if for_all {
                    self.resolved.keep(asked, &answer).await;
                }
                Ok(convert::resolved_image(answer, &platform))
            })
            .await
    }

    async fn list_warm_images(
        &self,
        request: Request<api::ListWarmImagesRequest>,
    ) -> Result<Response<api::ListWarmImagesResponse>, Status> {
        self.metrics
            .call("ListWarmImages", request, async |_| {
                let list =
                    self.asker.ask(&ListWarm {}, PATIENCE).await.map_err(|refusal| status::of(&refusal))?;
                Ok(api::ListWarmImagesResponse {
                    images: list.images.into_iter().map(convert::warm_image).collect(),
                })
            })
            .await
    }

    async fn resolve_workspace_image(
        &self,
        request: Request<api::ResolveWorkspaceImageRequest>,
    ) -> Result<Response<api::ResolveWorkspaceImageResponse>, Status> {
        self.metrics
            .call("ResolveWorkspaceImage", request, async |request| {
                let (source, mut secrets) = request::source(request.source, self.config.file_remotes)?;
                secrets.registry = request::registry_auth(request.auth)?;
                let question = ask::WorkspaceImage {
                    source: ask::source_to_json(&source).map_err(|error| status::of(&error))?,
                    secrets: self.seal(&secrets)?,
                    clone_target: None,
                };
                let answer = self.asker.ask(&question, PATIENCE).await.map_err(|error| status::of(&error))?;
                Ok(api::ResolveWorkspaceImageResponse {
                    r#ref: answer.target_ref,
                    base_ref: answer.base_ref,
                    exists: answer.exists,
                })
            })
            .await
    }
}

impl BuildsApi {
    async fn build(&self, request: api::BuildImageRequest) -> Result<api::BuildImageResponse, Status> {
        request::check_build(&request)?;
        let timeout_ms = request::timeout_ms(request.timeout)?;
        let (source, mut secrets) = request::source(request.source, self.config.file_remotes)?;
        secrets.registry = request::registry_auth(request.auth)?;
        secrets.mounts = request::mounts(request.secrets);
        let question = ask::Build {
            request_id: format!("{:032x}", rand::random::<u128>()),
            source: ask::source_to_json(&source).map_err(|error| status::of(&error))?,
            secrets: self.seal(&secrets)?,
            force: request.force,
            owner: request.owner,
            timeout_ms,
            labels: request.labels,
            no_cache: request.no_cache,
            clone_target: None,
            unfetchable: String::new(),
        };
        let answer =
            self.asker.ask_to_write(&question, PATIENCE).await.map_err(|error| status::of(&error))?;
        let outcome = match (answer.build, answer.already_built) {
            (Some(build), _) => api::build_image_response::Outcome::Build(self.build_of(build).await?),
            (None, Some(built)) => api::build_image_response::Outcome::AlreadyBuilt(api::AlreadyBuilt {
                r#ref: built.target_ref,
                base_ref: built.base_ref,
                digest: built.digest,
            }),
            (None, None) => {
                return Err(Status::internal("the orchestrator answered with neither build nor image"));
            }
        };
        Ok(api::BuildImageResponse { outcome: Some(outcome), joined: answer.joined })
    }

    async fn log(&self, request: api::BuildLogsRequest) -> Result<Answers<api::LogChunk>, Status> {
        let id = request::build_id(&request.id)?;
        let start = match request.start {
            None => Start::Beginning,
            Some(api::build_logs_request::Start::Offset(offset)) => Start::Offset(offset),
            Some(api::build_logs_request::Start::TailBytes(bytes)) => Start::Tail(bytes),
        };
        let log = self.build_logs.open(&id).await.map_err(status::of_read)?;
        let chunks = log.read(start, request.follow);
        Ok(Box::pin(chunks.map(|chunk| chunk.map(convert::chunk).map_err(status::of_read))))
    }

    pub(crate) fn seal(&self, secrets: &Secrets) -> Result<Bytes, Status> {
        kiln_bus::secrets::seal(&self.seal_key, secrets).map_err(|error| Status::internal(error.to_string()))
    }

    /// A build as an orchestrator answered it, once our own view knows it too.
    async fn build_of(&self, answer: ask::RecordAt) -> Result<api::Build, Status> {
        let record = answer.record().map_err(|error| status::of(&error))?;
        self.view.reached(answer.revision, OWN_VIEW).await;
        let known = self.view.get(&record.id).filter(|entry| entry.sequence >= answer.revision);
        let entry = match known {
            Some(entry) => (*entry).clone(),
            None => Entry {
                stored_at: record.queued_at.unwrap_or_default(),
                record,
                event: String::new(),
                sequence: answer.revision,
                event_id: String::new(),
            },
        };
        Ok(self.shown(&entry).await)
    }

    /// A build's last event, or NOT_FOUND.
    pub(crate) async fn entry(&self, id: &BuildId) -> Result<Entry, Status> {
        let known = self.build_logs.last_event(id).await.map_err(status::of_bus)?;
        known.ok_or_else(|| status::of_read(ReadError::UnknownBuild { id: id.clone() }))
    }

    /// A build with what the bus knows of it besides its record.
    pub(crate) async fn shown(&self, entry: &Entry) -> api::Build {
        let progress = match entry.record.state {
            State::Running => self.steps.of(&entry.record.id).await,
            _ => None,
        };
        convert::build(entry, self.queue.ahead(entry), progress.as_ref())
    }
}
