//! The running steps of all builds, by one subscription for the process.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::StreamExt as _;
use kiln_bus::logs::Logs;
use kiln_bus::view::View;
use kiln_contract::event::Progress;
use kiln_domain::id::BuildId;
use tokio::sync::broadcast;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Steps that a watcher may be behind; it then misses some, which costs nothing.
const TOLD_KEPT: usize = 256;

/// The last step that was told of each running build; clones share it.
#[derive(Clone)]
pub(crate) struct Steps {
    last: Arc<Mutex<HashMap<BuildId, Progress>>>,
    told: broadcast::Sender<(BuildId, Progress)>,
    logs: Logs,
}

impl Steps {
    /// Follows the steps of all builds until `stop`.
    pub(crate) fn start(logs: &Logs, view: &View, tasks: &TaskTracker, stop: &CancellationToken) -> Self {
        let steps =
            Self { last: Arc::default(), told: broadcast::Sender::new(TOLD_KEPT), logs: logs.clone() };
        let (following, view, stop) = (steps.clone(), view.clone(), stop.clone());
        tasks.spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = following.follow(&view) => {}
            }
        });
        steps
    }

    /// The step that a build runs, as far as is known.
    pub(crate) async fn of(&self, id: &BuildId) -> Option<Progress> {
        let known = self.last().get(id).cloned();
        match known {
            Some(known) => Some(known),
            // Told before this gateway began to listen.
            None => self.logs.last_progress(id).await,
        }
    }

    /// Every step that is told from now on.
    pub(crate) fn told(&self) -> broadcast::Receiver<(BuildId, Progress)> {
        self.told.subscribe()
    }

    async fn follow(&self, view: &View) {
        loop {
            match self.logs.progress().await {
                Ok(told) => {
                    let mut told = std::pin::pin!(told);
                    while let Some((id, progress)) = told.next().await {
                        self.take(view, id, progress);
                    }
                }
                Err(error) => tracing::warn!("the builds' steps can't be followed now: {error}"),
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }

    fn take(&self, view: &View, id: BuildId, progress: Progress) {
        {
            let mut last = self.last();
            if !last.contains_key(&id) {
                // A new build is the time to forget those that are over.
                last.retain(|id, _| view.get(id).is_some_and(|entry| !entry.record.state.is_terminal()));
            }
            last.insert(id.clone(), progress.clone());
        }
        // Nobody watches: nobody misses it.
        let _ = self.told.send((id, progress));
    }

    fn last(&self) -> MutexGuard<'_, HashMap<BuildId, Progress>> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
