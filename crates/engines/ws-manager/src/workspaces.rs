//! What ws-manager says of its workspaces: by its stream of changes, and, as that may have gaps, by a look at all of them
//! after each connection and from time to time.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kiln_domain::engine::EngineError;
use kiln_domain::id::RunId;
use kiln_domain::reference::ImageReference;
use kiln_proto::wsman;
use kiln_proto::wsman::WorkspacePhase;
use kiln_proto::wsman::workspace_manager_client::WorkspaceManagerClient;
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval, sleep};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};

use crate::connection::told;
use crate::revocations::Revocations;
use crate::state::{MANAGED_BY, State, run_of};

/// ws-manager sends the head of its stream with the first change only, so a stream that stands can't be told from one that is
/// not there yet: this often all workspaces are looked at in any case.
const LOOK: Duration = Duration::from_secs(15);
/// For a look, and a question about one workspace.
const ANSWER: Duration = Duration::from_secs(10);
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// A run that is over is forgotten after so many looks that don't find it.
const ABSENCES: u32 = 20;
const MESSAGE_BYTES: usize = 16 << 20;

type Client = WorkspaceManagerClient<Channel>;

/// Every run that has a workspace, or had one a moment ago.
pub(crate) struct Workspaces {
    client: Client,
    known: Mutex<HashMap<RunId, Known>>,
    changed: watch::Sender<()>,
    revocations: Arc<dyn Revocations>,
    tasks: TaskTracker,
    stop: CancellationToken,
}

struct Known {
    state: Arc<State>,
    /// Looks in a row that did not find it.
    absences: u32,
}

impl Workspaces {
    pub(crate) fn follow(channel: Channel, revocations: Arc<dyn Revocations>) -> Arc<Self> {
        let workspaces = Arc::new(Self {
            client: WorkspaceManagerClient::new(channel).max_decoding_message_size(MESSAGE_BYTES),
            known: Mutex::default(),
            changed: watch::Sender::default(),
            revocations,
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
        });
        let follower = workspaces.clone();
        workspaces.tasks.spawn(async move {
            let stop = follower.stop.clone();
            stop.run_until_cancelled(follower.follow_on()).await;
        });
        workspaces
    }

    pub(crate) async fn close(&self) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// Wakes after every change.
    pub(crate) fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// The last that was said of a run.
    pub(crate) fn get(&self, run: &RunId) -> Option<Arc<State>> {
        self.known().get(run).map(|known| known.state.clone())
    }

    pub(crate) fn knows(&self, run: &RunId) -> bool {
        self.known().contains_key(run)
    }

    pub(crate) fn forget(&self, run: &RunId) {
        self.known().remove(run);
    }

    pub(crate) async fn start(
        &self,
        request: wsman::StartWorkspaceRequest,
        within: Duration,
    ) -> Result<wsman::StartWorkspaceResponse, Status> {
        let mut client = self.client.clone();
        Ok(in_time(within, client.start_workspace(request)).await?.into_inner())
    }

    /// What the answer to a start tells; a status may have told more already.
    pub(crate) fn started(
        &self,
        run: &RunId,
        target: &ImageReference,
        answer: wsman::StartWorkspaceResponse,
    ) {
        let state = State {
            target: target.to_string(),
            url: answer.url,
            owner_token: answer.owner_token,
            ..State::default()
        };
        self.take(run, state);
    }

    pub(crate) async fn stop(
        &self,
        request: wsman::StopWorkspaceRequest,
        within: Duration,
    ) -> Result<(), Status> {
        let mut client = self.client.clone();
        in_time(within, client.stop_workspace(request)).await.map(|_| ())
    }

    /// Asks about a run; of one that was there and is gone, what is known of its end.
    pub(crate) async fn ask(&self, run: &RunId) -> Result<Option<Arc<State>>, EngineError> {
        let mut client = self.client.clone();
        let request = wsman::DescribeWorkspaceRequest { id: run.to_string() };
        match in_time(ANSWER, client.describe_workspace(request)).await {
            Ok(answer) => {
                if let Some(status) = answer.into_inner().status {
                    self.take(run, State::of(&status));
                }
            }
            Err(status) if status.code() == Code::NotFound => self.gone(run),
            Err(status) => return Err(EngineError::Unavailable(format!("ws-manager: {}", told(&status)))),
        }
        Ok(self.get(run))
    }

    /// The workspaces that build images and are no runs of ours, as ws-manager has them now.
    pub(crate) async fn others(&self) -> Result<Vec<wsman::WorkspaceStatus>, EngineError> {
        let mut client = self.client.clone();
        let request = wsman::GetWorkspacesRequest { must_match: Some(image_builds()) };
        let all = in_time(ANSWER, client.get_workspaces(request)).await;
        let all = all.map_err(|status| EngineError::Unavailable(format!("ws-manager: {}", told(&status))))?;
        let mut others = all.into_inner().status;
        others.retain(|status| run_of(status).is_none() && status.phase() != WorkspacePhase::Stopped);
        Ok(others)
    }

    async fn follow_on(&self) {
        let mut pause = FIRST_PAUSE;
        let mut said = false;
        loop {
            let mut heard = false;
            let Err(error) = self.follow_once(&mut heard).await else { continue };
            if heard {
                (pause, said) = (FIRST_PAUSE, false);
            }
            if !std::mem::replace(&mut said, true) {
                tracing::warn!("ws-manager can't be followed now: {}", told(&error));
            }
            sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    async fn follow_once(&self, heard: &mut bool) -> Result<(), Status> {
        let mut client = self.client.clone();
        let request = wsman::SubscribeRequest { must_match: Some(image_builds()) };
        let subscribing = client.subscribe(request);
        tokio::pin!(subscribing);
        let mut looks = interval(LOOK);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let stream = loop {
            tokio::select! {
                subscribed = &mut subscribing => break subscribed?.into_inner(),
                _ = looks.tick() => {
                    self.look_at_all().await?;
                    *heard = true;
                }
            }
        };
        // What changed before the stream stood.
        self.look_at_all().await?;
        *heard = true;
        self.hear(stream, looks).await
    }

    async fn hear(
        &self,
        mut stream: Streaming<wsman::SubscribeResponse>,
        mut looks: tokio::time::Interval,
    ) -> Result<(), Status> {
        loop {
            tokio::select! {
                change = stream.message() => match change? {
                    Some(change) => {
                        let status = change.status.unwrap_or_default();
                        if let Some(run) = run_of(&status) {
                            self.take(&run, State::of(&status));
                        }
                    }
                    None => return Err(Status::unavailable("its stream of changes ended")),
                },
                _ = looks.tick() => self.look_at_all().await?,
            }
        }
    }

    /// Compares with all that there is: who is gone has ended, and who should not be there is stopped.
    async fn look_at_all(&self) -> Result<(), Status> {
        // Who was started after this may rightly be missing in the answer.
        let before: Vec<RunId> = self.known().keys().cloned().collect();
        let mut client = self.client.clone();
        let request = wsman::GetWorkspacesRequest { must_match: Some(image_builds()) };
        let all = in_time(ANSWER, client.get_workspaces(request)).await?.into_inner().status;
        let there: HashMap<RunId, wsman::WorkspaceStatus> =
            all.into_iter().filter_map(|status| Some((run_of(&status)?, status))).collect();
        for (run, status) in &there {
            self.take(run, State::of(status));
        }
        for run in before.iter().filter(|run| !there.contains_key(run)) {
            self.gone(run);
        }
        self.stop_revoked(&there).await;
        Ok(())
    }

    async fn stop_revoked(&self, there: &HashMap<RunId, wsman::WorkspaceStatus>) {
        for run in there.keys() {
            let goes_on = self.get(run).is_some_and(|state| state.end.is_none());
            if !goes_on || !matches!(self.revocations.get(run).await, Ok(Some(_))) {
                continue;
            }
            tracing::warn!(run.id = %run, "workspace `{run}` runs, and should not: it is stopped");
            let mut request = wsman::StopWorkspaceRequest { id: run.to_string(), ..Default::default() };
            request.set_policy(wsman::StopWorkspacePolicy::Immediately);
            if let Err(status) = self.stop(request, ANSWER).await {
                tracing::warn!(run.id = %run, "workspace `{run}` can't be stopped now: {}", told(&status));
            }
        }
    }

    fn take(&self, run: &RunId, newer: State) {
        {
            let mut all = self.known();
            let known =
                all.entry(run.clone()).or_insert_with(|| Known { state: Arc::default(), absences: 0 });
            known.absences = 0;
            let then = known.state.then(newer);
            if *known.state == then {
                return;
            }
            known.state = Arc::new(then);
        }
        self.changed.send_replace(());
    }

    fn gone(&self, run: &RunId) {
        {
            let mut all = self.known();
            let Some(known) = all.get_mut(run) else { return };
            known.absences += 1;
            if known.state.end.is_some() {
                if known.absences > ABSENCES {
                    all.remove(run);
                }
                return;
            }
            known.state = Arc::new(known.state.vanished());
        }
        tracing::debug!(run.id = %run, "workspace `{run}` is gone");
        self.changed.send_replace(());
    }

    fn known(&self) -> MutexGuard<'_, HashMap<RunId, Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The workspaces that build images, our runs and the old service's.
fn image_builds() -> wsman::MetadataFilter {
    let annotations = [(MANAGED_BY.0.to_owned(), MANAGED_BY.1.to_owned())].into();
    wsman::MetadataFilter { annotations, ..Default::default() }
}

async fn in_time<T>(within: Duration, call: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
    let late = |_| Err(Status::unavailable(format!("no answer within {within:?}")));
    tokio::time::timeout(within, call).await.unwrap_or_else(late)
}
