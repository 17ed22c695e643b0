//! Places in the queue: worked out once for all who ask, some four times a second at most.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use kiln_bus::journal::Entry;
use kiln_bus::view::View;
use kiln_domain::id::BuildId;
use kiln_domain::queue::turns;
use kiln_domain::record::{Record, State};
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Changes of the queue within this time are one.
const PAUSE: Duration = Duration::from_millis(250);

/// How many builds are ahead of each that waits; clones share it.
#[derive(Clone)]
pub(crate) struct Queue {
    view: View,
    places: watch::Sender<Arc<HashMap<BuildId, usize>>>,
}

impl Queue {
    /// Follows the view until `stop`.
    pub(crate) fn start(view: &View, tasks: &TaskTracker, stop: &CancellationToken) -> Self {
        let queue = Self { view: view.clone(), places: watch::Sender::default() };
        let (following, stop) = (queue.clone(), stop.clone());
        tasks.spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = following.follow() => {}
            }
        });
        queue
    }

    /// How many of the waiting builds get a slot before this one, as things stand; 0 for one that doesn't wait.
    pub(crate) fn ahead(&self, entry: &Entry) -> usize {
        if !waits(&entry.record) {
            return 0;
        }
        let known = self.places.borrow().get(&entry.record.id).copied();
        known.unwrap_or_else(|| {
            // Accepted a moment ago.
            let places = places(&self.view);
            places.get(&entry.record.id).copied().unwrap_or(places.len())
        })
    }

    /// Told whenever a place has changed.
    pub(crate) fn changes(&self) -> watch::Receiver<Arc<HashMap<BuildId, usize>>> {
        self.places.subscribe()
    }

    async fn follow(&self) {
        let mut changes = self.view.changes();
        loop {
            let places = places(&self.view);
            self.places.send_if_modified(|known| {
                let changed = **known != places;
                if changed {
                    *known = Arc::new(places);
                }
                changed
            });
            if matches!(changes.recv().await, Err(RecvError::Closed)) {
                return;
            }
            tokio::time::sleep(PAUSE).await;
            // What came meanwhile is in the view.
            changes = changes.resubscribe();
        }
    }
}

/// Whether a build waits for a slot; one that is claimed has it, though it may not run yet.
pub(crate) fn waits(record: &Record) -> bool {
    record.state == State::Queued && record.claimed_by.is_none()
}

fn places(view: &View) -> HashMap<BuildId, usize> {
    let active = view.active();
    let (waiting, others): (Vec<_>, Vec<_>) = active.iter().partition(|entry| waits(&entry.record));
    let claimed = others.iter().filter(|entry| entry.record.claimed_by.is_some());
    let owners: Vec<&str> = waiting.iter().map(|entry| entry.record.owner.as_str()).collect();
    let order = turns(&owners, claimed.map(|entry| entry.record.owner.as_str()));
    let in_turn = order.into_iter().filter_map(|(place, _)| waiting.get(place));
    in_turn.enumerate().map(|(ahead, entry)| (entry.record.id.clone(), ahead)).collect()
}
