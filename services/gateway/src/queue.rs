//! Places in the queue: worked out once for all who ask, some four times a second at most.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use kiln_bus::journal::Entry;
use kiln_bus::view::View;
use kiln_domain::id::BuildId;
use kiln_domain::queue::turns;
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
        if !entry.record.waits() {
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

fn places(view: &View) -> HashMap<BuildId, usize> {
    let active = view.active();
    let (waiting, others): (Vec<_>, Vec<_>) = active.iter().partition(|entry| entry.record.waits());
    let claimed = others.iter().filter(|entry| entry.record.claimed_by.is_some());
    let owners: Vec<&str> = waiting.iter().map(|entry| entry.record.owner.as_str()).collect();
    let order = turns(&owners, claimed.map(|entry| entry.record.owner.as_str()));
    let in_turn = order.into_iter().filter_map(|(place, _)| waiting.get(place));
    in_turn.enumerate().map(|(ahead, entry)| (entry.record.id.clone(), ahead)).collect()
}

#[cfg(test)]
mod tests {
    use kiln_bus::Connect;
    use kiln_bus::journal::Journal;
    use kiln_bus::layout::Layout;
    use kiln_domain::id::InstanceId;
    use kiln_domain::transition::Change;
    use kiln_testkit::{nats, records};

    use super::*;

    const SOON: Duration = Duration::from_secs(20);

    #[tokio::test]
    async fn places_follow_the_turns_and_who_waits_hears_of_it() {
        let server = nats::run_server().await.unwrap();
        let connect = Connect { url: server.url(), user: None, password: None, name: "test".into() };
        let bus = connect.connect().await.unwrap();
        let layout = Layout { journal_max_bytes: 64 << 20, logs_max_bytes: 64 << 20, ..Layout::default() };
        bus.provision(&layout).await.unwrap();
        let journal = Journal::open(&bus).await.unwrap();
        let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
        let view = View::start(&bus, 10, &tasks, &stop);
        let by = InstanceId::new("orchestrator", 1).unwrap();
        let mut entries = Vec::new();
        for (n, owner) in [(0, "ann"), (1, "ann"), (2, "ann"), (3, "bob")] {
            let mut record = records::queued(&n.to_string(), [n; 10]).unwrap();
            record.owner = owner.into();
            entries.push(journal.append(None, &Change::Queued(Box::new(record)), &by).await.unwrap());
        }
        let claim = async |entry: &Entry| {
            let claimed =
                journal.append(Some(entry), &Change::Claimed { by: by.clone() }, &by).await.unwrap();
            assert!(view.reached(claimed.sequence, SOON).await);
            claimed
        };
        entries[0] = claim(&entries[0]).await;
        let queue = Queue::start(&view, &tasks, &stop);
        let ahead = |entries: &[Entry]| entries.iter().map(|entry| queue.ahead(entry)).collect::<Vec<_>>();
        // One of ann's has its slot, so bob, who came last, is next.
        assert_eq!(ahead(&entries), [0, 1, 2, 0]);
        let mut changes = queue.changes();
        entries[3] = claim(&entries[3]).await;
        let heard = changes.wait_for(|places| places.get(&entries[1].record.id) == Some(&0));
        tokio::time::timeout(SOON, heard).await.expect("it hears of its new place").unwrap();
        assert_eq!(ahead(&entries), [0, 0, 1, 0]);
        stop.cancel();
    }
}
