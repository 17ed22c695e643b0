//! Watching a build: its record now, then after every change, to the end.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::Arc;

use futures::{Stream, StreamExt as _};
use kiln_bus::journal::{Entry, Journal};
use kiln_bus::view::{News, View};
use kiln_contract::event::Progress;
use kiln_domain::id::BuildId;
use kiln_proto::kiln_v1 as api;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{broadcast, watch};
use tonic::Status;

use crate::builds::BuildsApi;
use crate::cut::{Cut, until_cut};
use crate::queue::Queue;
use crate::{convert, status};

/// Where a watcher is.
struct Watch {
    view: View,
    journal: Journal,
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
            journal: self.journal.clone(),
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
            Some((build, watch))
        });
        let all = futures::stream::once(async { Ok(first) }).chain(later);
        Box::pin(until_cut(all, self.cuts.cut()))
    }
}

impl Watch {
    async fn next(&mut self) -> Option<Result<api::Build, Status>> {
        if self.over {
            return None;
        }
        loop {
            let newer =
                self.view.get(&self.sent.record.id).filter(|entry| entry.sequence > self.sent.sequence);
            if let Some(newer) = newer {
                self.sent = (*newer).clone();
                self.over = self.sent.record.state.is_terminal();
                return Some(Ok(self.shown()));
            }
            tokio::select! {
                change = self.changes.recv() => match change {
                    Ok(News::Changed(_)) => {}
                    // What was missed may be that the view began anew.
                    Err(RecvError::Lagged(_)) if self.view.get(&self.sent.record.id).is_some() => {}
                    Ok(News::BegunAnew) | Err(RecvError::Lagged(_)) => {
                        return Some(self.known_anew().await);
                    }
                    // Its end ends the watch.
                    Err(RecvError::Closed) => return None,
                },
                changed = self.places.changed(), if self.sent.record.waits() => {
                    if changed.is_err() {
                        return None;
                    }
                    if self.queue.ahead(&self.sent) != self.ahead {
                        return Some(Ok(self.shown()));
                    }
                }
                told = self.told.recv() => match told {
                    Ok((id, step)) if id == self.sent.record.id => {
                        self.step = Some(step);
                        return Some(Ok(self.shown()));
                    }
                    // Of another build, or some were missed: the next will do.
                    Ok(_) | Err(RecvError::Lagged(_)) => {}
                    Err(RecvError::Closed) => return None,
                },
            }
        }
    }

    /// The build as the journal's leader has it, after the view began anew.
    async fn known_anew(&mut self) -> Result<api::Build, Status> {
        let id = self.sent.record.id.clone();
        self.view.caught_up().await;
        let known = self.journal.last_of_build(&id).await.map_err(status::of_bus)?;
        self.sent = known.ok_or(Cut::Lost(id))?;
        self.over = self.sent.record.state.is_terminal();
        Ok(self.shown())
    }

    fn shown(&mut self) -> api::Build {
        self.ahead = self.queue.ahead(&self.sent);
        convert::build(&self.sent, self.ahead, self.step.as_ref())
    }
}
