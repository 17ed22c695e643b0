//! Watching a build: its record now, then after every change, to the end.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::Arc;

use futures::{Stream, StreamExt as _};
use kiln_bus::journal::Entry;
use kiln_bus::view::News;
use kiln_contract::event::Progress;
use kiln_domain::id::BuildId;
use kiln_proto::kiln_v1 as api;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{broadcast, watch};
use tonic::Status;

use crate::builds::BuildsApi;
use crate::convert;
use crate::queue::Queue;
use crate::stopping::until_stopped;

/// Where a watcher is.
struct Watch {
    view: kiln_bus::view::View,
    changes: broadcast::Receiver<News>,
    told: broadcast::Receiver<(BuildId, Progress)>,
    queue: Queue,
    places: watch::Receiver<Arc<HashMap<BuildId, usize>>>,
    /// The place in the queue that was sent last.
    ahead: usize,
    /// The last event that was sent.
    sent: Entry,
    step: Option<Progress>,
    over: bool,
}

impl BuildsApi {
    pub(crate) async fn watch(
        &self,
        entry: Entry,
    ) -> Pin<Box<dyn Stream<Item = Result<api::Build, Status>> + Send>> {
        let changes = self.view.changes();
        let told = self.steps.told();
        let places = self.queue.changes();
        let ahead = self.queue.ahead(&entry);
        let first = self.shown(&entry).await;
        let over = entry.record.state.is_terminal();
        let watch = Watch {
            view: self.view.clone(),
            changes,
            told,
            queue: self.queue.clone(),
            places,
            ahead,
            sent: entry,
            step: None,
            over,
        };
        let later = futures::stream::unfold(watch, async |mut watch| {
            let build = watch.next().await?;
            Some((Ok(build), watch))
        });
        let all = futures::stream::once(async { Ok(first) }).chain(later);
        Box::pin(until_stopped(all, self.stop.clone()))
    }
}

impl Watch {
    async fn next(&mut self) -> Option<api::Build> {
        if self.over {
            return None;
        }
        loop {
            let newer =
                self.view.get(&self.sent.record.id).filter(|entry| entry.sequence > self.sent.sequence);
            if let Some(newer) = newer {
                self.sent = (*newer).clone();
                self.over = self.sent.record.state.is_terminal();
                return Some(self.shown());
            }
            tokio::select! {
                // A lag only makes us look at the view again; its end ends the watch.
                change = self.changes.recv() => {
                    if matches!(change, Err(RecvError::Closed)) {
                        return None;
                    }
                }
                changed = self.places.changed(), if self.sent.record.waits() => {
                    if changed.is_err() {
                        return None;
                    }
                    if self.queue.ahead(&self.sent) != self.ahead {
                        return Some(self.shown());
                    }
                }
                told = self.told.recv() => match told {
                    Ok((id, step)) if id == self.sent.record.id => {
                        self.step = Some(step);
                        return Some(self.shown());
                    }
                    // Of another build, or some were missed: the next will do.
                    Ok(_) | Err(RecvError::Lagged(_)) => {}
                    Err(RecvError::Closed) => return None,
                },
            }
        }
    }

    fn shown(&mut self) -> api::Build {
        self.ahead = self.queue.ahead(&self.sent);
        convert::build(&self.sent, self.ahead, self.step.as_ref())
    }
}
