//! A fake ws-manager after the protocol of Gitpod's: workspaces whose work a test plays, with their supervisors.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Result;
use async_trait::async_trait;
use futures::{Stream, StreamExt as _};
use kiln_proto::wsman;
use kiln_proto::wsman::workspace_manager_server::{WorkspaceManager, WorkspaceManagerServer};
use kiln_proto::wsman::{WorkspaceConditionBool, WorkspacePhase, WorkspaceStatus};
use tokio::net::TcpListener;
use tokio::sync::{broadcast, watch};
use tokio::time::Instant;
use tokio_stream::wrappers::BroadcastStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status};

use crate::supervisor::Supervisors;

/// A slow subscriber is dropped after so many changes.
const SUBSCRIBER: usize = 250;

/// What workspaces do.
#[async_trait]
pub trait Work: Send + Sync {
    /// The work of one; its error is what its task ended with.
    async fn build(&self, workspace: &Workspace) -> Result<(), String>;
}

/// A running ws-manager.
pub struct WsManager {
    pub address: SocketAddr,
    pub supervisors: Supervisors,
    shared: Arc<Shared>,
    tasks: TaskTracker,
    stop: CancellationToken,
}

/// When a workspace came and went, for figures.
#[derive(Clone, Copy, Debug, Default)]
pub struct Moments {
    /// StartWorkspace was called.
    pub asked: Option<Instant>,
    /// STOPPED was sent.
    pub stopped: Option<Instant>,
}

/// As [`Work::build`] gives it.
type End = watch::Sender<Option<Result<(), String>>>;

struct Shared {
    workspaces: Mutex<BTreeMap<String, WorkspaceStatus>>,
    stops: Mutex<BTreeMap<String, CancellationToken>>,
    /// How the work of a workspace is over, if a test says so.
    ends: Mutex<BTreeMap<String, End>>,
    changes: broadcast::Sender<WorkspaceStatus>,
    supervisors: Supervisors,
    work: Arc<dyn Work>,
    version: Mutex<u64>,
    tasks: TaskTracker,
    /// By the image that is built.
    moments: Mutex<BTreeMap<String, Moments>>,
    /// So many starts are answered with UNAVAILABLE.
    unavailable: AtomicU32,
    starts: AtomicU32,
    /// While it is set, a start is not answered, whatever becomes of the workspace.
    answers_held: watch::Sender<bool>,
    /// While it is set, workspaces are STOPPING and don't come to STOPPED.
    stops_held: watch::Sender<bool>,
    /// Each change of it ends every subscription.
    cuts: watch::Sender<()>,
}

/// A workspace, for who plays its work.
pub struct Workspace {
    pub request: wsman::StartWorkspaceRequest,
    supervisors: Supervisors,
    /// Somebody asked that it stop.
    pub stop: CancellationToken,
}

/// Where a workspace writes.
pub struct Terminal {
    supervisors: Supervisors,
    id: String,
}

impl Terminal {
    pub fn write(&self, bytes: &[u8]) {
        self.supervisors.write(&self.id, bytes);
    }
}

impl Workspace {
    pub fn write(&self, text: &str) {
        self.supervisors.write(&self.request.id, text.as_bytes());
    }

    /// For who writes while the work goes on elsewhere.
    pub fn terminal(&self) -> Terminal {
        Terminal { supervisors: self.supervisors.clone(), id: self.request.id.clone() }
    }

    /// An annotation of it; empty if there is none.
    pub fn annotation(&self, name: &str) -> &str {
        let metadata = self.request.metadata.as_ref();
        metadata.and_then(|metadata| metadata.annotations.get(name)).map_or("", String::as_str)
    }
}

impl WsManager {
    pub async fn start(work: Arc<dyn Work>) -> Result<Self> {
        let tasks = TaskTracker::new();
        let supervisors = Supervisors::start(&tasks).await?;
        let shared = Arc::new(Shared {
            workspaces: Mutex::default(),
            stops: Mutex::default(),
            ends: Mutex::default(),
            changes: broadcast::Sender::new(SUBSCRIBER),
            supervisors: supervisors.clone(),
            work,
            version: Mutex::default(),
            tasks: tasks.clone(),
            moments: Mutex::default(),
            unavailable: AtomicU32::new(0),
            starts: AtomicU32::new(0),
            answers_held: watch::Sender::default(),
            stops_held: watch::Sender::default(),
            cuts: watch::Sender::default(),
        });
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let stop = CancellationToken::new();
        let server = tonic::transport::Server::builder()
            .add_service(WorkspaceManagerServer::from_arc(Arc::new(Service(shared.clone()))));
        let stopped = stop.clone().cancelled_owned();
        // As Go's server has it: a STOPPED right after STOPPING does not wait for the client's acknowledgement.
        let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
        tasks.spawn(server.serve_with_incoming_shutdown(incoming, stopped));
        Ok(Self { address, supervisors, shared, tasks, stop })
    }

    /// The next starts are refused so often.
    pub fn refuse_starts(&self, times: u32) {
        self.shared.unavailable.store(times, Ordering::SeqCst);
    }

    /// Starts are not answered as long as this holds, though workspaces are started.
    pub fn hold_answers(&self, held: bool) {
        self.shared.answers_held.send_replace(held);
    }

    /// Workspaces stay STOPPING as long as this holds.
    pub fn hold_stops(&self, held: bool) {
        self.shared.stops_held.send_replace(held);
    }

    /// Waits until a workspace has come to this phase.
    pub async fn until(&self, id: &str, phase: WorkspacePhase) {
        let mut changes = self.shared.changes.subscribe();
        while self.shared.workspaces().get(id).is_none_or(|status| status.phase() != phase) {
            // What was missed is in the list.
            let _ = changes.recv().await;
        }
    }

    /// Of the workspace that builds this image.
    pub fn moments(&self, target: &str) -> Moments {
        self.shared.moments().get(target).copied().unwrap_or_default()
    }

    /// How many starts were asked for, refused ones too.
    pub fn starts(&self) -> u32 {
        self.shared.starts.load(Ordering::SeqCst)
    }

    /// Ends every subscription, as a restart does.
    pub fn cut(&self) {
        self.shared.cuts.send_replace(());
    }

    /// A workspace and its supervisor vanish, and nobody is told.
    pub fn vanish(&self, id: &str) {
        self.shared.workspaces().remove(id);
        self.shared.supervisors.remove(id);
    }

    /// Its work is over, well, whatever it was at.
    pub fn finish(&self, id: &str) {
        self.shared.end_of(id).send_replace(Some(Ok(())));
    }

    /// Its work is over with an error.
    pub fn fail(&self, id: &str, error: &str) {
        self.shared.end_of(id).send_replace(Some(Err(error.to_owned())));
    }

    /// Somebody else started this.
    pub fn add(&self, status: WorkspaceStatus) {
        self.shared.change(&status.id.clone(), |known| *known = status);
    }

    /// Sends a status whatever the last one was.
    pub fn tell(&self, status: WorkspaceStatus) {
        let _ = self.shared.changes.send(status);
    }

    /// The workspaces that have not stopped.
    pub fn running(&self) -> Vec<WorkspaceStatus> {
        let all = self.shared.workspaces();
        all.values().filter(|status| status.phase() != WorkspacePhase::Stopped).cloned().collect()
    }
}

impl Drop for WsManager {
    fn drop(&mut self) {
        self.stop.cancel();
        self.tasks.close();
    }
}

impl Shared {
    fn workspaces(&self) -> MutexGuard<'_, BTreeMap<String, WorkspaceStatus>> {
        self.workspaces.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn moments(&self) -> MutexGuard<'_, BTreeMap<String, Moments>> {
        self.moments.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end_of(&self, id: &str) -> End {
        let mut ends = self.ends.lock().unwrap_or_else(PoisonError::into_inner);
        ends.entry(id.to_owned()).or_default().clone()
    }

    fn change(&self, id: &str, change: impl FnOnce(&mut WorkspaceStatus)) {
        let mut all = self.workspaces();
        let status = all.entry(id.to_owned()).or_default();
        change(status);
        let mut version = self.version.lock().unwrap_or_else(PoisonError::into_inner);
        *version += 1;
        status.status_version = *version;
        // Nobody may be subscribed.
        let _ = self.changes.send(status.clone());
    }

    async fn run(self: Arc<Self>, workspace: Workspace) {
        let id = workspace.request.id.clone();
        let conditions = |change: &dyn Fn(&mut wsman::WorkspaceConditions)| {
            self.change(&id, |status| change(status.conditions.get_or_insert_default()));
        };
        for phase in [WorkspacePhase::Creating, WorkspacePhase::Initializing, WorkspacePhase::Running] {
            self.change(&id, |status| status.set_phase(phase));
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let mut end = self.end_of(&id).subscribe();
        let worked = tokio::select! {
            worked = self.work.build(&workspace) => Some(worked),
            Ok(said) = end.wait_for(Option::is_some) => said.clone(),
            () = workspace.stop.cancelled() => None,
        };
        match &worked {
            None => conditions(&|c| c.set_stopped_by_request(WorkspaceConditionBool::True)),
            Some(Err(error)) => {
                conditions(&|c| c.headless_task_failed = format!("headless task failed: {error}"))
            }
            Some(Ok(())) => {}
        }
        self.supervisors.exit(&id, i32::from(!matches!(worked, Some(Ok(())))));
        self.change(&id, |status| status.set_phase(WorkspacePhase::Stopping));
        // Mostly it doesn't wait: STOPPED comes right after.
        let _ = self.stops_held.subscribe().wait_for(|held| !held).await;
        self.moments().entry(workspace.annotation("ref").to_owned()).or_default().stopped =
            Some(Instant::now());
        self.change(&id, |status| status.set_phase(WorkspacePhase::Stopped));
    }
}

struct Service(Arc<Shared>);

fn matches(filter: Option<&wsman::MetadataFilter>, status: &WorkspaceStatus) -> bool {
    let annotations = status.metadata.as_ref().map(|metadata| &metadata.annotations);
    filter.is_none_or(|filter| {
        filter
            .annotations
            .iter()
            .all(|(name, value)| annotations.and_then(|all| all.get(name)) == Some(value))
    })
}

#[tonic::async_trait]
impl WorkspaceManager for Service {
    type SubscribeStream = Pin<Box<dyn Stream<Item = Result<wsman::SubscribeResponse, Status>> + Send>>;

    async fn get_workspaces(
        &self,
        request: Request<wsman::GetWorkspacesRequest>,
    ) -> Result<Response<wsman::GetWorkspacesResponse>, Status> {
        let filter = request.into_inner().must_match;
        let all = self.0.workspaces();
        let status = all.values().filter(|status| matches(filter.as_ref(), status)).cloned().collect();
        Ok(Response::new(wsman::GetWorkspacesResponse { status }))
    }

    async fn subscribe(
        &self,
        request: Request<wsman::SubscribeRequest>,
    ) -> Result<Response<Self::SubscribeStream>, Status> {
        let filter = request.into_inner().must_match;
        let mut cuts = self.0.cuts.subscribe();
        let changes = BroadcastStream::new(self.0.changes.subscribe()).filter_map(move |change| {
            let change = match change {
                Ok(status) if matches(filter.as_ref(), &status) => {
                    Some(Ok(wsman::SubscribeResponse { status: Some(status), ..Default::default() }))
                }
                Ok(_) => None,
                Err(_) => Some(Err(Status::unavailable("subscriber is too slow"))),
            };
            futures::future::ready(change)
        });
        let cut = async move {
            let _ = cuts.changed().await;
        };
        Ok(Response::new(Box::pin(changes.take_until(Box::pin(cut)))))
    }

    async fn start_workspace(
        &self,
        request: Request<wsman::StartWorkspaceRequest>,
    ) -> Result<Response<wsman::StartWorkspaceResponse>, Status> {
        let request = request.into_inner();
        let shared = &self.0;
        shared.starts.fetch_add(1, Ordering::SeqCst);
        let take = |left: u32| left.checked_sub(1);
        if shared.unavailable.fetch_update(Ordering::SeqCst, Ordering::SeqCst, take).is_ok() {
            return Err(Status::unavailable("ws-manager is starting"));
        }
        let spec = request.spec.clone().unwrap_or_default();
        if spec.workspace_image.is_empty() || spec.workspace_location.is_empty() || spec.initializer.is_none()
        {
            return Err(Status::invalid_argument("invalid request"));
        }
        let id = request.id.clone();
        let annotations = request.metadata.as_ref().map(|metadata| &metadata.annotations);
        if let Some(target) = annotations.and_then(|all| all.get("ref")) {
            shared.moments().entry(target.clone()).or_default().asked = Some(Instant::now());
        }
        if shared.workspaces().contains_key(&id) {
            return Err(Status::already_exists("workspace instance already exists"));
        }
        let owner_token = format!("token-of-{id}");
        let url = shared.supervisors.add(&id, &owner_token);
        let stop = CancellationToken::new();
        shared.stops.lock().unwrap_or_else(PoisonError::into_inner).insert(id.clone(), stop.clone());
        shared.change(&id, |status| {
            status.id.clone_from(&id);
            status.metadata.clone_from(&request.metadata);
            status.set_phase(WorkspacePhase::Pending);
            status.spec = Some(wsman::WorkspaceSpec { url: url.clone(), ..Default::default() });
            status.auth = Some(wsman::WorkspaceAuthentication {
                owner_token: owner_token.clone(),
                ..Default::default()
            });
        });
        let workspace = Workspace { request, supervisors: shared.supervisors.clone(), stop };
        shared.tasks.spawn(shared.clone().run(workspace));
        let _ = shared.answers_held.subscribe().wait_for(|held| !held).await;
        Ok(Response::new(wsman::StartWorkspaceResponse { url, owner_token }))
    }

    async fn stop_workspace(
        &self,
        request: Request<wsman::StopWorkspaceRequest>,
    ) -> Result<Response<wsman::StopWorkspaceResponse>, Status> {
        let id = request.into_inner().id;
        if !self.0.workspaces().contains_key(&id) {
            return Err(Status::not_found("workspace does not exist"));
        }
        if let Some(stop) = self.0.stops.lock().unwrap_or_else(PoisonError::into_inner).get(&id) {
            stop.cancel();
        }
        Ok(Response::new(wsman::StopWorkspaceResponse {}))
    }

    async fn describe_workspace(
        &self,
        request: Request<wsman::DescribeWorkspaceRequest>,
    ) -> Result<Response<wsman::DescribeWorkspaceResponse>, Status> {
        let id = request.into_inner().id;
        let status = self.0.workspaces().get(&id).cloned();
        let status = status.ok_or_else(|| Status::not_found("workspace does not exist"))?;
        Ok(Response::new(wsman::DescribeWorkspaceResponse { status: Some(status), ..Default::default() }))
    }
}
