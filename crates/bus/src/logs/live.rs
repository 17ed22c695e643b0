//! A log as it grows: one subscription for each build and process, however many follow it.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use async_nats::Subscriber;
use futures::StreamExt as _;
use kiln_contract::subject;
use kiln_domain::id::BuildId;
use tokio::sync::{Notify, OnceCell, broadcast, watch};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::message::LogMessage;
use super::{LogTail, Logs, Shared};
use crate::error::BusError;

/// Chunks that a follower may be behind before it goes back to the stream. A chunk is freed once all have it.
const RING: usize = 64;
/// A lost last message leaves no gap: after this long without one, the leader is asked.
const IDLE: Duration = Duration::from_secs(3);

/// One build's live log in this process. The subscription ends with the last follower.
pub(super) struct Live {
    id: BuildId,
    owner: Weak<Shared>,
    begun: OnceCell<DropGuard>,
    feed: Arc<Feed>,
}

struct Feed {
    ring: broadcast::Sender<LogMessage>,
    /// The sequence of the last message that came. It begins anew with the stream.
    last: AtomicU64,
    /// The last message, as the leader told it when it was another than the last that came.
    told: watch::Sender<Option<Arc<LogTail>>>,
    check: Notify,
}

/// One follower's end.
pub(super) struct Follower {
    live: Arc<Live>,
    ring: broadcast::Receiver<LogMessage>,
    told: watch::Receiver<Option<Arc<LogTail>>>,
}

/// What a follower hears.
pub(super) enum Heard {
    Chunk(LogMessage),
    /// Something up to this sequence is in the stream that did not come this way.
    Behind(u64),
    /// This is the log's last message, and it may be that nothing of it came this way.
    Tail(Arc<LogTail>),
}

impl Logs {
    /// Follows a build's live log: what is stored after this has returned comes this way, or shows as a gap.
    pub(super) async fn follow(&self, id: &BuildId) -> Result<Follower, BusError> {
        let live = {
            let mut all = self.shared.live();
            let known = all.get(id).and_then(Weak::upgrade);
            known.unwrap_or_else(|| {
                let live = Arc::new(Live::new(id.clone(), Arc::downgrade(&self.shared)));
                all.insert(id.clone(), Arc::downgrade(&live));
                live
            })
        };
        let (ring, told) = (live.feed.ring.subscribe(), live.feed.told.subscribe());
        live.begun.get_or_try_init(|| self.begin(&live)).await?;
        Ok(Follower { live, ring, told })
    }

    async fn begin(&self, live: &Live) -> Result<DropGuard, BusError> {
        let client = &self.shared.bus.client;
        let messages = client
            .subscribe(subject::live_log(&live.id))
            .await
            .map_err(|error| BusError::unavailable("follow a log", error))?;
        let stop = CancellationToken::new();
        let (feed, id) = (live.feed.clone(), live.id.clone());
        self.shared.tasks.spawn(stop.clone().run_until_cancelled_owned(feed.clone().pump(messages)));
        // Not the whole of `Logs`: a task that never ends must not keep it.
        let logs = Arc::downgrade(&self.shared);
        self.shared.tasks.spawn(stop.clone().run_until_cancelled_owned(feed.ask_when_idle(logs, id)));
        Ok(stop.drop_guard())
    }
}

impl Shared {
    fn live(&self) -> MutexGuard<'_, HashMap<BuildId, Weak<Live>>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn forget(&self, id: &BuildId) {
        let mut all = self.live();
        // Another may have taken its place already.
        if all.get(id).is_some_and(|live| live.strong_count() == 0) {
            all.remove(id);
        }
    }
}

impl Live {
    fn new(id: BuildId, owner: Weak<Shared>) -> Self {
        let feed = Feed {
            ring: broadcast::Sender::new(RING),
            last: AtomicU64::new(0),
            told: watch::Sender::new(None),
            check: Notify::new(),
        };
        Self { id, owner, begun: OnceCell::new(), feed: Arc::new(feed) }
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        if let Some(owner) = self.owner.upgrade() {
            owner.forget(&self.id);
        }
    }
}

impl Feed {
    /// Takes every message at once, so that no follower can slow the connection.
    async fn pump(self: Arc<Self>, mut messages: Subscriber) {
        while let Some(message) = messages.next().await {
            match LogMessage::sent(message) {
                Ok(message) => {
                    self.last.store(message.sequence, Ordering::Relaxed);
                    // Nobody listens only in the moment before the end.
                    let _ = self.ring.send(message);
                }
                // The gap that it leaves is read from the stream, where the error is the reader's.
                Err(error) => tracing::warn!("a live message of a log can't be read: {error}"),
            }
        }
    }

    async fn ask_when_idle(self: Arc<Self>, shared: Weak<Shared>, id: BuildId) {
        let mut before = 0;
        loop {
            let asked = tokio::time::timeout(IDLE, self.check.notified()).await.is_ok();
            let last = self.last.load(Ordering::Relaxed);
            if last != before && !asked {
                before = last;
                continue;
            }
            let Some(shared) = shared.upgrade() else { return };
            // Away: it is asked again after the next pause.
            if let Ok(Some(tail)) = (Logs { shared }).tail(&id).await
                && tail.sequence != last
            {
                let tail = Some(Arc::new(tail));
                self.told.send_if_modified(|told| tail != std::mem::replace(told, tail.clone()));
            }
        }
    }
}

impl Follower {
    /// The next news. Safe to be dropped half-way.
    pub(super) async fn hear(&mut self) -> Result<Heard, BusError> {
        let feed = &self.live.feed;
        tokio::select! {
            biased;
            chunk = self.ring.recv() => match chunk {
                Ok(chunk) => Ok(Heard::Chunk(chunk)),
                Err(broadcast::error::RecvError::Lagged(_)) => Ok(Heard::Behind(feed.last.load(Ordering::Relaxed))),
                Err(broadcast::error::RecvError::Closed) => Err(BusError::unavailable("follow a log", "the connection is closed")),
            },
            // Fails only when its sender is gone, which `self` holds.
            _ = self.told.changed() => {
                let told = self.told.borrow_and_update().clone();
                Ok(told.map_or(Heard::Behind(0), Heard::Tail))
            }
        }
    }

    /// Has the leader asked now, not only after a pause.
    pub(super) fn check(&self) {
        self.live.feed.check.notify_one();
    }
}
