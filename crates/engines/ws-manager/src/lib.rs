//! The ws-manager engine: a run is an IMAGEBUILD workspace of Gitpod's ws-manager, as image-builder-mk3 starts one.
//!
//! - **I am asked** by the orchestrator (start, observe, cancel, revoke, remove) and the log-relay (read).
//! - **I ask** ws-manager over gRPC, the workspace's supervisor for its output, and the registry what a workspace that
//!   ended well has left at the target: ws-manager knows nothing of images.
//! - **I tell** nobody. What I know of workspaces is ws-manager's word, and asked again by whoever comes after me.
//! - **I never** touch a workspace that isn't a run of ours, and a status never waits for a registry or a reader.
//!
//! ws-manager can't fence: a workspace may be created by a request that was under way when its run was revoked. Such a one
//! is stopped on sight.

mod alerts;
mod config;
mod connection;
mod cursor_key;
mod output;
mod overlap;
mod request;
mod revocations;
mod state;
mod supervisor;
mod workspaces;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;
use kiln_domain::engine::{Cursor, Engine, EngineError, Handle, Observed, OthersBuild, Output, OutputAccess};
use kiln_domain::failure::{Failure, FailureReason};
use kiln_domain::id::RunId;
use kiln_domain::limits;
use kiln_domain::reference::{Digest, ImageReference};
use kiln_domain::run::{Ended, Findings, Outcome, RunResult, RunSecrets, RunSpec};
use kiln_proto::wsman;
use kiln_registry::{Access, Registry};
use tokio::time::sleep;
use tonic::Code;

pub use crate::config::{Config, Tls};
use crate::connection::told;
pub use crate::cursor_key::CursorKey;
use crate::output::Outputs;
pub use crate::revocations::{Mark, Revocations};
use crate::state::{End, State};
use crate::workspaces::Workspaces;

/// How often a start is asked for again while ws-manager can't be reached; then the caller decides.
const STARTS: u32 = 3;
const BETWEEN_STARTS: Duration = Duration::from_secs(1);
/// A start waits in ws-manager until the workspace has its URL: 30 s.
const START: Duration = Duration::from_secs(60);
const STOP: Duration = Duration::from_secs(20);
/// How long a registry may take to say what lies at a target.
const REGISTRY: Duration = Duration::from_secs(20);
/// A run whose changes are not heard of is asked about after so long.
const LOOK: Duration = Duration::from_secs(30);

/// Runs builders as workspaces.
pub struct WsManagerEngine {
    config: Config,
    workspaces: Arc<Workspaces>,
    outputs: Outputs,
    cursor_key: Arc<CursorKey>,
    revocations: Arc<dyn Revocations>,
    registry: Arc<dyn Registry>,
    /// How runs ended that a registry was asked about: the same answer each time.
    ended: Mutex<HashMap<RunId, Ended>>,
}

impl WsManagerEngine {
    /// Begins to follow ws-manager, which need not be there yet.
    pub fn start(
        config: Config,
        revocations: Arc<dyn Revocations>,
        registry: Arc<dyn Registry>,
        cursor_key: CursorKey,
    ) -> Result<Self, connection::Error> {
        let channel = connection::channel(&config)?;
        let http = connection::http()?;
        let workspaces = Workspaces::follow(channel, revocations.clone());
        let cursor_key = Arc::new(cursor_key);
        let outputs = Outputs::new(workspaces.clone(), http, cursor_key.clone());
        Ok(Self { config, workspaces, outputs, cursor_key, revocations, registry, ended: Mutex::default() })
    }

    /// Ends the engine's own tasks; workspaces run on.
    pub async fn close(&self) {
        self.outputs.close().await;
        self.workspaces.close().await;
    }

    fn handle(spec: &RunSpec) -> Handle {
        Handle::new(format!("{} {}", spec.run, spec.target_ref))
    }

    /// How a workspace ended, with what it left at the target.
    async fn judge(&self, run: &RunId, state: &State, end: &End) -> Result<Ended, EngineError> {
        if let Some(ended) = self.known_end(run) {
            return Ok(ended);
        }
        let ended = match end {
            End::Well => {
                let target = state.target.parse::<ImageReference>();
                match target {
                    Ok(target) => match self.find(&target).await? {
                        Some(digest) => Ended {
                            outcome: Some(outcome(RunResult::Pushed(digest.clone()))),
                            recorded: Some(digest),
                        },
                        None => failed(Failure::new(
                            FailureReason::ImageMissing,
                            format!("the build ended well, but there is no image at {target}"),
                        )),
                    },
                    // Not even its annotations say what it was to make: the orchestrator knows.
                    Err(_) => Ended::default(),
                }
            }
            End::Failed(failure) => failed(failure.clone()),
            End::Lost => Ended::default(),
        };
        let mut known = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(known.entry(run.clone()).or_insert(ended).clone())
    }

    fn known_end(&self, run: &RunId) -> Option<Ended> {
        self.ended.lock().unwrap_or_else(PoisonError::into_inner).get(run).cloned()
    }

    async fn find(&self, target: &ImageReference) -> Result<Option<Digest>, EngineError> {
        for pause in [Some(limits::IN_FLIGHT), None] {
            let found = self.registry.digest(target, &Access::anonymous(REGISTRY)).await;
            match (found, pause) {
                (Ok(None), Some(pause)) => sleep(pause).await,
                (Ok(found), _) => return Ok(found),
                (Err(error), _) => return Err(EngineError::Unavailable(error.to_string())),
            }
        }
        Ok(None)
    }

    async fn is_revoked(&self, run: &RunId) -> Result<bool, EngineError> {
        Ok(self.revocations.get(run).await?.is_some())
    }

    /// What ws-manager says of a run now; `None` where there is nothing, or nothing but what was removed.
    async fn look(&self, run: &RunId) -> Result<Option<Arc<State>>, EngineError> {
        let state = self.workspaces.ask(run).await?;
        let removed = || async { Ok(self.revocations.get(run).await? == Some(Mark::Removed)) };
        match state {
            Some(state) if state.end.is_some() && removed().await? => Ok(None),
            state => Ok(state),
        }
    }
}

/// As image-builder-mk3 tells it; `None` where something is missing.
fn access(url: &str, owner_token: &str) -> Option<OutputAccess> {
    if url.is_empty() || owner_token.is_empty() {
        return None;
    }
    let headers = [(supervisor::OWNER_TOKEN.to_owned(), owner_token.into())].into();
    Some(OutputAccess { url: url.to_owned(), headers })
}

fn others_build(status: &wsman::WorkspaceStatus) -> OthersBuild {
    let started = status.metadata.as_ref().and_then(|metadata| metadata.started_at.as_ref());
    let base = status.metadata.as_ref().and_then(|metadata| metadata.annotations.get(state::BASE));
    let state = State::of(status);
    OthersBuild {
        id: status.id.clone(),
        base_ref: base.cloned().unwrap_or_default(),
        started_at: started.and_then(|at| Timestamp::new(at.seconds, at.nanos).ok()),
        output: access(&state.url, &state.owner_token),
        target_ref: state.target,
    }
}

fn outcome(result: RunResult) -> Outcome {
    Outcome { result, findings: Findings::default() }
}

fn failed(failure: Failure) -> Ended {
    Ended { outcome: Some(outcome(RunResult::Failed(failure))), recorded: None }
}

#[async_trait]
impl Engine for WsManagerEngine {
    fn name(&self) -> &'static str {
        "ws-manager"
    }

    fn fetches_contexts(&self) -> bool {
        true
    }

    async fn start(&self, spec: &RunSpec, secrets: &RunSecrets) -> Result<Handle, EngineError> {
        let run = &spec.run;
        if self.is_revoked(run).await? {
            return Err(EngineError::Revoked);
        }
        let handle = Self::handle(spec);
        if self.known_end(run).is_some() || self.workspaces.knows(run) {
            return Ok(handle);
        }
        let request = request::start(spec, secrets, &self.config).map_err(EngineError::Rejected)?;
        let mut tried = 0;
        loop {
            tried += 1;
            let refused = match self.workspaces.start(request.clone(), START).await {
                Ok(response) => {
                    self.workspaces.started(run, &spec.target_ref, response);
                    return Ok(handle);
                }
                // A run's id is its own: whoever has it began this run, or we did and did not hear of it.
                Err(status) if status.code() == Code::AlreadyExists => return Ok(handle),
                Err(status) => status,
            };
            tracing::warn!(run.id = %run, "ws-manager does not start `{run}`: {}", told(&refused));
            match refused.code() {
                Code::Unavailable if tried < STARTS => sleep(BETWEEN_STARTS).await,
                // It will never take this.
                Code::InvalidArgument
                | Code::PermissionDenied
                | Code::Unauthenticated
                | Code::Unimplemented => {
                    let message = format!("ws-manager refused the workspace: {}", told(&refused));
                    return Err(EngineError::Rejected(Failure::new(FailureReason::Internal, message)));
                }
                // Full, under maintenance, or in trouble.
                _ => return Err(EngineError::Unavailable(format!("ws-manager: {}", told(&refused)))),
            }
        }
    }

    async fn observe(&self, run: &RunId) -> Result<Observed, EngineError> {
        let Some(state) = self.look(run).await? else { return Ok(Observed::Absent) };
        match &state.end {
            Some(end) => Ok(Observed::Ended(self.judge(run, &state, end).await?)),
            None => Ok(Observed::Running(Handle::new(format!("{run} {}", state.target)))),
        }
    }

    async fn ended(&self, run: &RunId, _handle: &Handle) -> Result<Ended, EngineError> {
        let mut changes = self.workspaces.changes();
        let mut state = self.look(run).await?;
        loop {
            match &state {
                Some(state) => {
                    if let Some(end) = &state.end {
                        return self.judge(run, state, end).await;
                    }
                }
                None => return Ok(self.known_end(run).unwrap_or_default()),
            }
            let changed = tokio::time::timeout(LOOK, changes.changed()).await;
            state = match (changed, self.workspaces.get(run)) {
                (Ok(Ok(())), Some(state)) => Some(state),
                _ => self.look(run).await?,
            };
        }
    }

    async fn cancel(&self, run: &RunId) -> Result<(), EngineError> {
        let request = wsman::StopWorkspaceRequest {
            id: run.to_string(),
            policy: wsman::StopWorkspacePolicy::Immediately.into(),
        };
        match self.workspaces.stop(request, STOP).await {
            Ok(()) => Ok(()),
            Err(status) if status.code() == Code::NotFound => Ok(()),
            Err(status) => Err(EngineError::Unavailable(format!("ws-manager: {}", told(&status)))),
        }
    }

    async fn revoke(&self, run: &RunId) -> Result<(), EngineError> {
        match self.revocations.get(run).await? {
            Some(_) => Ok(()),
            None => self.revocations.put(run, Mark::Revoked).await,
        }
    }

    /// ws-manager removes a workspace that has stopped by itself.
    async fn remove(&self, run: &RunId) -> Result<(), EngineError> {
        self.revocations.put(run, Mark::Removed).await?;
        if self.workspaces.ask(run).await?.is_some_and(|state| state.end.is_none()) {
            self.cancel(run).await?;
        }
        self.outputs.forget(run);
        self.workspaces.forget(run);
        self.ended.lock().unwrap_or_else(PoisonError::into_inner).remove(run);
        Ok(())
    }

    async fn read(&self, run: &RunId, from: &Cursor, max: usize) -> Result<Output, EngineError> {
        if self.revocations.get(run).await? == Some(Mark::Removed) {
            return Err(EngineError::Gone);
        }
        self.outputs.read(run, from, max).await
    }

    fn advance(&self, from: &Cursor, bytes: &[u8]) -> Cursor {
        self.cursor_key.cursor(&self.cursor_key.place(from).advanced(bytes))
    }

    async fn output_access(&self, run: &RunId) -> Result<Option<OutputAccess>, EngineError> {
        let known = self.workspaces.get(run).and_then(|state| access(&state.url, &state.owner_token));
        if known.is_some() {
            return Ok(known);
        }
        let Some(state) = self.workspaces.ask(run).await? else { return Err(EngineError::Gone) };
        match access(&state.url, &state.owner_token) {
            None if state.end.is_none() => {
                Err(EngineError::Unavailable("the workspace has no URL yet".to_owned()))
            }
            access => Ok(access),
        }
    }

    async fn others(&self) -> Result<Vec<OthersBuild>, EngineError> {
        let others = self.workspaces.others().await?;
        Ok(others.iter().map(others_build).collect())
    }
}
