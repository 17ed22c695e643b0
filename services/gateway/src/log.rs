//! The log of a build as a client reads it, by whatever protocol it came.
//!
//! Every read of a log passes [`BuildLogs::find`]: whether a caller may read it is to be asked there.

use futures::{Stream, StreamExt as _};
use kiln_bus::BusError;
use kiln_bus::journal::{Entry, Journal};
use kiln_bus::logs::{Chunk, LogError, Logs, Start, Until};
use kiln_bus::view::View;
use kiln_domain::id::BuildId;
use tokio::sync::broadcast::error::RecvError;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::stopping::{Stopping, until_stopped};

/// Reads logs until `stop`; clones share it.
#[derive(Clone)]
pub(crate) struct BuildLogs {
    pub(crate) view: View,
    pub(crate) journal: Journal,
    pub(crate) logs: Logs,
    pub(crate) tasks: TaskTracker,
    pub(crate) stop: CancellationToken,
}

/// Why a client doesn't get a log, or not the rest of it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReadError {
    /// Neither its record is there nor its log.
    #[error("build {id} not found: it never was, or is past retention")]
    UnknownBuild { id: BuildId },
    #[error(transparent)]
    Log(#[from] LogError),
    #[error(transparent)]
    Bus(#[from] BusError),
    #[error(transparent)]
    Stopping(#[from] Stopping),
}

impl BuildLogs {
    /// The log from `start` to what is there now, or, with `follow`, to its end. The first error ends it.
    pub(crate) async fn read(
        &self,
        id: &BuildId,
        start: Start,
        follow: bool,
    ) -> Result<impl Stream<Item = Result<Chunk, ReadError>> + Send + use<>, ReadError> {
        let build = self.find(id).await?;
        let over = CancellationToken::new();
        let reading = over.clone().drop_guard();
        let until = if follow { Until::Complete { over: over.clone() } } else { Until::Now };
        if build.is_none_or(|entry| entry.record.state.is_terminal()) {
            over.cancel();
        } else if follow {
            let (view, id) = (self.view.clone(), id.clone());
            self.tasks.spawn(async move {
                tokio::select! {
                    // The reader is gone.
                    () = over.cancelled() => {}
                    () = ended(&view, &id) => over.cancel(),
                }
            });
        }
        let chunks = self.logs.read(id, start, until).map(move |chunk| {
            let _ = &reading;
            chunk.map_err(ReadError::from)
        });
        Ok(until_stopped(chunks, self.stop.clone()))
    }

    /// The build whose log is to be read; `None` where only its log is left: logs and records are kept for different
    /// times.
    async fn find(&self, id: &BuildId) -> Result<Option<Entry>, ReadError> {
        if let Some(entry) = self.view.get(id) {
            return Ok(Some((*entry).clone()));
        }
        if let Some(entry) = self.journal.last_of_build(id).await? {
            return Ok(Some(entry));
        }
        match self.logs.tail(id).await? {
            Some(_) => Ok(None),
            None => Err(ReadError::UnknownBuild { id: id.clone() }),
        }
    }
}

/// Waits until the view sees the end of a build that wasn't over a moment ago.
async fn ended(view: &View, id: &BuildId) {
    let mut changes = view.changes();
    while view.get(id).is_none_or(|entry| !entry.record.state.is_terminal()) {
        // A lag only makes us look again.
        if matches!(changes.recv().await, Err(RecvError::Closed)) {
            return;
        }
    }
}
