//! A gateway for the command line's tests: it answers as it is told to, and breaks streams off at random.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use futures::stream::{self, BoxStream, StreamExt as _};
use kiln_proto::kiln_v1::build_logs_request::Start;
use kiln_proto::kiln_v1::builds_server::{Builds, BuildsServer};
use kiln_proto::kiln_v1::{
    Build, BuildImageRequest, BuildImageResponse, BuildLogInfoRequest, BuildLogsRequest, BuildState,
    BuildStatusRequest, CancelBuildRequest, ListBuildsRequest, ListBuildsResponse, ListWarmImagesRequest,
    ListWarmImagesResponse, LogChunk, LogInfo, ResolveBaseImageRequest, ResolveBaseImageResponse,
    ResolveWorkspaceImageRequest, ResolveWorkspaceImageResponse, WarmImage, WatchBuildRequest,
};
use rand::rngs::SmallRng;
use rand::{RngExt as _, SeedableRng as _};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

/// What the gateway knows and does; tests set it before or while the command runs.
pub(super) struct Script {
    /// Newest first; pages hold two.
    pub(super) builds: Mutex<Vec<Build>>,
    /// The newest record, for whoever watches.
    pub(super) record: watch::Sender<Build>,
    pub(super) log: Vec<u8>,
    /// So many bytes of the log are there.
    pub(super) written: watch::Sender<usize>,
    /// The first byte that retention kept.
    pub(super) kept_from: u64,
    /// It has no bus.
    pub(super) away: bool,
    /// No byte of the log was kept.
    pub(super) lost: bool,
    /// So often a log's stream breaks off.
    pub(super) breaks: Mutex<u32>,
    /// What BuildImage answers, once `answering`.
    pub(super) answer: Mutex<VecDeque<Result<BuildImageResponse, Status>>>,
    pub(super) answering: watch::Sender<bool>,
    pub(super) asked: watch::Sender<Vec<BuildImageRequest>>,
    pub(super) cancelled: Mutex<Vec<CancelBuildRequest>>,
    pub(super) random: Mutex<SmallRng>,
}

impl Script {
    pub(super) fn new(seed: u64) -> Self {
        Self {
            builds: Mutex::default(),
            record: watch::Sender::default(),
            log: Vec::new(),
            written: watch::Sender::new(usize::MAX),
            kept_from: 0,
            away: false,
            lost: false,
            breaks: Mutex::new(0),
            answer: Mutex::default(),
            answering: watch::Sender::new(true),
            asked: watch::Sender::default(),
            cancelled: Mutex::default(),
            random: Mutex::new(SmallRng::seed_from_u64(seed)),
        }
    }

    fn random(&self, below: usize) -> usize {
        self.random.lock().unwrap().random_range(0..below)
    }

    fn find(&self, id: &str) -> Result<Build, Status> {
        let builds = self.builds.lock().unwrap();
        builds.iter().find(|build| build.id == id).cloned().ok_or_else(|| Status::not_found("no such build"))
    }

    /// One of the ways in which a stream is broken off, if one is due.
    fn break_off(&self) -> Option<Option<Status>> {
        let mut breaks = self.breaks.lock().unwrap();
        if *breaks == 0 || self.random(6) > 0 {
            return None;
        }
        *breaks -= 1;
        Some(
            [Some(Status::unavailable("shutting down")), Some(Status::internal("lost")), None]
                [self.random(3)]
            .clone(),
        )
    }

    /// The next chunk after `offset` once there is one; `None` at the end of what is there.
    async fn chunk(&self, offset: usize, follow: bool) -> Option<LogChunk> {
        let mut written = self.written.subscribe();
        if follow {
            let there = |written: &usize| *written > offset || *written >= self.log.len();
            written.wait_for(there).await.unwrap();
        }
        let end = (*written.borrow()).min(self.log.len());
        let whole = end == self.log.len();
        if offset >= end && !whole {
            return None;
        }
        let length = (end - offset).min(1 + self.random(4_096));
        let content = self.log[offset..offset + length].to_vec();
        Some(LogChunk { content, offset: offset as u64, complete: offset + length == self.log.len() })
    }
}

/// A gateway that listens until it is dropped.
pub(super) struct Gateway {
    pub(super) script: Arc<Script>,
    pub(super) address: SocketAddr,
    _server: JoinSet<()>,
}

impl Gateway {
    pub(super) async fn start(script: Script) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let script = Arc::new(script);
        let service = BuildsServer::new(Scripted(script.clone()));
        let mut server = JoinSet::new();
        server.spawn(async move {
            let router = tonic::transport::Server::builder().add_service(service);
            router.serve_with_incoming(TcpListenerStream::new(listener)).await.unwrap();
        });
        Self { script, address, _server: server }
    }
}

struct Scripted(Arc<Script>);

#[tonic::async_trait]
impl Builds for Scripted {
    async fn build_image(
        &self,
        request: Request<BuildImageRequest>,
    ) -> Result<Response<BuildImageResponse>, Status> {
        self.0.asked.send_modify(|asked| asked.push(request.into_inner()));
        self.0.answering.subscribe().wait_for(|answering| *answering).await.unwrap();
        let answer = self.0.answer.lock().unwrap().pop_front();
        answer.unwrap_or_else(|| Err(Status::unavailable("no orchestrator answers"))).map(Response::new)
    }

    async fn build_status(&self, request: Request<BuildStatusRequest>) -> Result<Response<Build>, Status> {
        self.0.find(&request.into_inner().id).map(Response::new)
    }

    type WatchBuildStream = BoxStream<'static, Result<Build, Status>>;

    async fn watch_build(
        &self,
        _: Request<WatchBuildRequest>,
    ) -> Result<Response<Self::WatchBuildStream>, Status> {
        let mut records = self.0.record.subscribe();
        records.mark_changed();
        let records = stream::unfold((records, false), |(mut records, ended)| async move {
            if ended {
                return None;
            }
            records.changed().await.ok()?;
            let record = records.borrow_and_update().clone();
            let ended = !matches!(record.state(), BuildState::Queued | BuildState::Running);
            Some((Ok(record), (records, ended)))
        });
        Ok(Response::new(records.boxed()))
    }

    type BuildLogsStream = BoxStream<'static, Result<LogChunk, Status>>;

    async fn build_logs(
        &self,
        request: Request<BuildLogsRequest>,
    ) -> Result<Response<Self::BuildLogsStream>, Status> {
        let request = request.into_inner();
        let script = self.0.clone();
        if script.away {
            return Err(Status::unavailable("the bus does not answer"));
        }
        if script.lost {
            return Err(Status::not_found("the log is gone"));
        }
        let end = (*script.written.borrow()).min(script.log.len()) as u64;
        let offset = match request.start {
            None => script.kept_from,
            Some(Start::Offset(offset)) if offset < script.kept_from || offset > script.log.len() as u64 => {
                return Err(Status::out_of_range(format!("the log begins at offset {}", script.kept_from)));
            }
            Some(Start::Offset(offset)) => offset,
            Some(Start::TailBytes(bytes)) => end.saturating_sub(bytes).max(script.kept_from),
        };
        let place = Some(offset as usize);
        let chunks = stream::unfold((script, place), move |(script, place)| async move {
            let offset = place?;
            match script.break_off() {
                Some(Some(status)) => return Some((Err(status), (script, None))),
                Some(None) if request.follow => return None,
                _ => {}
            }
            let chunk = script.chunk(offset, request.follow).await?;
            let next = (!chunk.complete).then_some(offset + chunk.content.len());
            Some((Ok(chunk), (script, next)))
        });
        Ok(Response::new(chunks.boxed()))
    }

    async fn build_log_info(
        &self,
        request: Request<BuildLogInfoRequest>,
    ) -> Result<Response<LogInfo>, Status> {
        let (id, script) = (request.into_inner().id, &self.0);
        if script.lost {
            return Err(Status::not_found("the log is gone"));
        }
        let length = (*script.written.borrow()).min(script.log.len());
        Ok(Response::new(LogInfo {
            id,
            length: length as u64,
            first_offset: script.kept_from,
            complete: length == script.log.len(),
            ..LogInfo::default()
        }))
    }

    async fn list_builds(
        &self,
        request: Request<ListBuildsRequest>,
    ) -> Result<Response<ListBuildsResponse>, Status> {
        const PAGE: usize = 2;
        let request = request.into_inner();
        let start: usize = request.page_token.parse().unwrap_or(0);
        let builds = self.0.builds.lock().unwrap();
        let fits = |build: &&Build| {
            (request.states.is_empty() || request.states.contains(&build.state))
                && (request.owner.is_empty() || request.owner == build.owner)
        };
        let fitting: Vec<Build> = builds.iter().filter(fits).cloned().collect();
        let end = fitting.len().min(start + PAGE.min(request.page_size as usize));
        let next_page_token = if end < fitting.len() { end.to_string() } else { String::new() };
        Ok(Response::new(ListBuildsResponse { builds: fitting[start..end].to_vec(), next_page_token }))
    }

    async fn cancel_build(&self, request: Request<CancelBuildRequest>) -> Result<Response<Build>, Status> {
        let request = request.into_inner();
        let build = self.0.find(&request.id)?;
        self.0.cancelled.lock().unwrap().push(request);
        Ok(Response::new(build))
    }

    async fn resolve_base_image(
        &self,
        request: Request<ResolveBaseImageRequest>,
    ) -> Result<Response<ResolveBaseImageResponse>, Status> {
        let request = request.into_inner();
        if request.r#ref == "UPPER/x" {
            return Err(Status::invalid_argument("ref: must be lowercase"));
        }
        let reference = format!("{}@sha256:{}#{}", request.r#ref, "0".repeat(64), request.platform);
        Ok(Response::new(ResolveBaseImageResponse {
            r#ref: reference,
            stale: !request.refresh,
            cached: !request.refresh,
            platform: request.platform,
            ..Default::default()
        }))
    }

    async fn resolve_workspace_image(
        &self,
        _: Request<ResolveWorkspaceImageRequest>,
    ) -> Result<Response<ResolveWorkspaceImageResponse>, Status> {
        Err(Status::unimplemented("the command line does not ask this"))
    }
    async fn list_warm_images(
        &self,
        _: Request<ListWarmImagesRequest>,
    ) -> Result<Response<ListWarmImagesResponse>, Status> {
        let warm = WarmImage { r#ref: "r.io/warm:1".into(), builds: 3, ..WarmImage::default() };
        Ok(Response::new(ListWarmImagesResponse { images: vec![warm] }))
    }
}
