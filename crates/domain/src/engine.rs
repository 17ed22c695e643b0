//! The engine port: what runs a builder somewhere. It decides nothing: whether to build is the orchestrator's.

use std::collections::BTreeMap;

use async_trait::async_trait;
use bytes::Bytes;
use jiff::Timestamp;
use schemars::JsonSchema;
use secrecy::SecretString;
use serde::{Deserialize, Serialize};

use crate::failure::Failure;
use crate::id::RunId;
use crate::run::{Ended, RunSecrets, RunSpec};

/// Enough to find a builder again from another process. Opaque to everyone but its engine; it holds no secret.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct Handle(String);

impl Handle {
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// A place in a run's output, opaque to everyone but its engine. The default is the beginning.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Cursor(String);

impl Cursor {
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// What is there of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Observed {
    /// Nothing: it was never started here, or all of it was removed.
    Absent,
    /// A builder runs, or may still begin to.
    Running(Handle),
    /// Nothing of it can still push.
    Ended(Ended),
}

/// A piece of a run's output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// May be empty, where nothing was written for some time.
    pub bytes: Bytes,
    /// The cursor of the first of `bytes`; [`Engine::advance`] gives those of the others.
    pub from: Cursor,
    /// Nothing follows, now or later.
    pub end: bool,
}

/// How a client that reads a run's output by itself gets to it, past this service.
#[derive(Clone, Debug)]
pub struct OutputAccess {
    pub url: String,
    /// Headers of each of its requests: they are credentials.
    pub headers: BTreeMap<String, SecretString>,
}

/// A build that somebody else runs where an engine runs its own.
#[derive(Clone, Debug)]
pub struct OthersBuild {
    pub id: String,
    pub target_ref: String,
    pub base_ref: String,
    pub started_at: Option<Timestamp>,
    pub output: Option<OutputAccess>,
}

/// An engine's refusal or trouble. None of them says anything of the build itself, but `Rejected`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EngineError {
    /// Try again: the engine can't be reached, or has no room.
    #[error("the engine can't be asked now: {0}")]
    Unavailable(String),
    /// It will never run this: the build has failed.
    #[error("the engine rejected the run: {0}")]
    Rejected(Failure),
    /// The run was revoked: it will not be started.
    #[error("the run was revoked")]
    Revoked,
    /// No such run, or its output is gone.
    #[error("the run is gone")]
    Gone,
}

/// Runs builders somewhere. Each call may be made again, by this process or another, and means the same.
#[async_trait]
pub trait Engine: Send + Sync {
    /// "local", "kubernetes", "ws-manager".
    fn name(&self) -> &'static str;

    /// The host that its builders are bound to, if they are: then nobody on another host can find or adopt them.
    fn host(&self) -> Result<Option<String>, EngineError> {
        Ok(None)
    }

    /// Its builders record a digest before they PUT it: one that failed, and recorded none, has PUT nothing.
    fn records_before_put(&self) -> bool {
        false
    }

    /// What its builders execute Dockerfiles with ("buildah", "buildkit"), where that is known before one has begun.
    fn build_tool(&self) -> Option<String> {
        None
    }

    /// Its builders fetch a Dockerfile's context by themselves, as the request says it: no commit need be known for them.
    fn fetches_contexts(&self) -> bool {
        false
    }

    /// Starts a run; of a run that was started before (also by another process) it gives the handle.
    /// [`EngineError::Revoked`] after [`Engine::revoke`].
    async fn start(&self, spec: &RunSpec, secrets: &RunSecrets) -> Result<Handle, EngineError>;

    /// What is there of a run.
    async fn observe(&self, run: &RunId) -> Result<Observed, EngineError>;

    /// Waits until nothing of the run can push any more. Adopts a builder that another process started: an engine
    /// needs no more than the run's name and handle. Dropping the future leaves the builder as it is.
    async fn ended(&self, run: &RunId, handle: &Handle) -> Result<Ended, EngineError>;

    /// Asks the builder to end, and sees to it after a grace. Returns when it was asked; [`Engine::ended`] tells when
    /// it is over. A run that is over or absent is no error.
    async fn cancel(&self, run: &RunId) -> Result<(), EngineError>;

    /// No builder of this run goes on, or begins, after this has returned `Ok`: a late start finds it, and a builder
    /// that was overlooked looks for it before it pushes, and ends without an outcome.
    async fn revoke(&self, run: &RunId) -> Result<(), EngineError>;

    /// Removes what is left of the run but its revocation: output, outcome, folders, mounts.
    async fn remove(&self, run: &RunId) -> Result<(), EngineError>;

    /// Reads the run's output from a cursor, at most `max` bytes. Where nothing is there yet it waits for some; it
    /// returns empty-handed after at most some seconds. Before the run's start it is [`EngineError::Gone`].
    async fn read(&self, run: &RunId, from: &Cursor, max: usize) -> Result<Output, EngineError>;

    /// The cursor `bytes` further on in an output.
    fn advance(&self, from: &Cursor, bytes: &[u8]) -> Cursor;

    /// How a client gets to the output of a run by itself; `None` where it can't, on this engine or with this run, and
    /// [`EngineError::Unavailable`] while that is not known yet.
    async fn output_access(&self, _run: &RunId) -> Result<Option<OutputAccess>, EngineError> {
        Ok(None)
    }

    /// What somebody else builds in the same place. None of it is ever touched.
    async fn others(&self) -> Result<Vec<OthersBuild>, EngineError> {
        Ok(Vec::new())
    }
}
