//! The log of a build as a client reads it, by whatever protocol it came.
//!
//! Every read of a log passes [`BuildLogs::find`]: whether a caller may read it is to be asked there.

use std::time::Duration;

use futures::{Stream, StreamExt as _};
use kiln_bus::BusError;
use kiln_bus::journal::{Entry, Journal};
use kiln_bus::logs::{Chunk, Extent, LogError, LogInfo, Logs, Start, Until};
use kiln_bus::view::View;
use kiln_domain::id::BuildId;
use kiln_domain::record::State;
use prometheus_client::metrics::gauge::Gauge;
use tokio::sync::broadcast::error::RecvError;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::builds::OWN_VIEW;
use crate::cut::{Cut, Cuts, until_cut};

/// How long a follower waits for news before it looks again.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// Reads logs until they are cut; clones share it.
#[derive(Clone)]
pub(crate) struct BuildLogs {
    pub(crate) view: View,
    pub(crate) journal: Journal,
    pub(crate) logs: Logs,
    pub(crate) tasks: TaskTracker,
    pub(crate) cuts: Cuts,
    /// Reads that go on, by whatever protocol.
    pub(crate) readers: Gauge,
}

/// Why a client doesn't get a log, or not the rest of it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReadError {
    /// Neither its record is there nor its log.
    #[error("build {id} not found: it never was, or is past retention")]
    UnknownBuild { id: BuildId },
    /// It will have one.
    #[error("the log of build {id} is not begun yet")]
    NotBegun { id: BuildId },
    /// Its record is kept longer than its log.
    #[error("there is no log of build {id} any more: retention has removed all of it")]
    Expired { id: BuildId },
    #[error(transparent)]
    Log(LogError),
    #[error(transparent)]
    Bus(#[from] BusError),
    #[error(transparent)]
    Cut(#[from] Cut),
}

/// A build's log, before it is read.
pub(crate) struct BuildLog {
    of: BuildLogs,
    id: BuildId,
    /// Nobody runs it, so that nobody will begin its log.
    pub(crate) is_over: bool,
    /// The journal knows it. Of a build that it doesn't know nobody writes the log on.
    pub(crate) is_known: bool,
}

impl BuildLogs {
    /// The log of a build that there is, or that there was and whose log is left.
    pub(crate) async fn open(&self, id: &BuildId) -> Result<BuildLog, ReadError> {
        let build = self.find(id).await?;
        let is_known = build.is_some();
        let is_over = build.is_none_or(|entry| entry.record.state.is_terminal());
        Ok(BuildLog { of: self.clone(), id: id.clone(), is_over, is_known })
    }

    /// How a build ended whose log is complete; `None` where its record is past retention. A log ends after its build, but
    /// our view may hear of that later.
    pub(crate) async fn final_state(&self, id: &BuildId) -> Option<State> {
        self.view.get(id)?;
        // A view that hears nothing has another state to tell.
        let _ = tokio::time::timeout(OWN_VIEW, ended(&self.view, &self.journal, id)).await;
        self.view.get(id).map(|entry| entry.record.state)
    }

    /// A build's last event: from the view, or, before it is called unknown, from the journal's leader.
    pub(crate) async fn last_event(&self, id: &BuildId) -> Result<Option<Entry>, BusError> {
        self.cuts.presence.check().await?;
        match self.view.get(id) {
            Some(entry) => Ok(Some((*entry).clone())),
            None => self.journal.last_of_build(id).await,
        }
    }

    /// The build whose log is to be read; `None` where only its log is left: logs and records are kept for different
    /// times.
    async fn find(&self, id: &BuildId) -> Result<Option<Entry>, ReadError> {
        if let Some(entry) = self.last_event(id).await? {
            return Ok(Some(entry));
        }
        match self.logs.tail(id).await? {
            Some(_) => Ok(None),
            None => Err(ReadError::UnknownBuild { id: id.clone() }),
        }
    }
}

impl BuildLog {
    pub(crate) fn id(&self) -> &BuildId {
        &self.id
    }

    /// Which bytes of it are there; `None` where none are.
    pub(crate) async fn extent(&self) -> Result<Option<Extent>, ReadError> {
        Ok(self.of.logs.extent(&self.id).await?)
    }

    /// What is to be said of it.
    pub(crate) async fn info(&self) -> Result<LogInfo, ReadError> {
        self.of.logs.info(&self.id).await?.ok_or_else(|| self.missing())
    }

    /// Why there is nothing.
    pub(crate) fn missing(&self) -> ReadError {
        let id = self.id.clone();
        if self.is_over { ReadError::Expired { id } } else { ReadError::NotBegun { id } }
    }

    /// The log from `start` to what is there now, or, with `follow`, to its end. The first error ends it.
    pub(crate) fn read(
        self,
        start: Start,
        follow: bool,
    ) -> impl Stream<Item = Result<Chunk, ReadError>> + Send + use<> {
        let (over, lost) = (CancellationToken::new(), CancellationToken::new());
        let reading = over.clone().drop_guard();
        let follows = follow && self.is_known;
        let until = if follows { Until::Complete { over: over.clone() } } else { Until::Now };
        if self.is_over {
            over.cancel();
        } else if follows {
            let BuildLogs { view, journal, .. } = self.of.clone();
            let (id, lost) = (self.id.clone(), lost.clone());
            self.of.tasks.spawn(async move {
                tokio::select! {
                    // The reader is gone.
                    () = over.cancelled() => {}
                    end = ended(&view, &journal, &id) => match end {
                        End::Terminal => over.cancel(),
                        End::Lost => lost.cancel(),
                    },
                }
            });
        }
        let (cut, id) = (self.of.cuts.cut(), self.id.clone());
        let cut = async move {
            tokio::select! {
                cut = cut => cut,
                () = lost.cancelled_owned() => Cut::Lost(id),
            }
        };
        self.of.readers.inc();
        let counted = Counted(self.of.readers.clone());
        let chunks = self.of.logs.read(&self.id, start, until).map(move |chunk| {
            let _ = (&reading, &counted);
            chunk.map_err(|error| match error {
                LogError::NotFound { .. } => self.missing(),
                LogError::Bus(error) => error.into(),
                error => ReadError::Log(error),
            })
        });
        until_cut(chunks, cut)
    }
}

/// A read that goes on, until it is dropped.
struct Counted(Gauge);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// How a build that wasn't over a moment ago came to its end.
enum End {
    Terminal,
    /// There will be none: the journal has lost the build.
    Lost,
}

/// Waits until the view sees a build's end.
async fn ended(view: &View, journal: &Journal, id: &BuildId) -> End {
    let mut changes = view.changes();
    loop {
        match view.get(id) {
            Some(entry) if entry.record.state.is_terminal() => return End::Terminal,
            Some(_) => {}
            // The view may only be behind, or hold no more what is over.
            None => match journal.last_of_build(id).await {
                Ok(None) => return End::Lost,
                Ok(Some(entry)) if entry.record.state.is_terminal() => return End::Terminal,
                Ok(Some(_)) | Err(_) => {}
            },
        }
        // Any news, and a lag, only makes us look again; so does what a view that began anew has read since.
        let heard = tokio::time::timeout(LOOK_AGAIN, changes.recv()).await;
        if matches!(heard, Ok(Err(RecvError::Closed))) {
            // The gateway ends.
            return End::Terminal;
        }
    }
}
