//! A view: the last record of every build, kept by one ordered consumer over the journal. One a process.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};
use std::time::Duration;

use async_nats::jetstream::consumer::DeliverPolicy;
use async_nats::jetstream::consumer::pull::OrderedConfig;
use async_nats::jetstream::stream;
use futures::StreamExt as _;
use jiff::Timestamp;
use kiln_contract::subject;
use kiln_domain::id::BuildId;
use tokio::sync::{broadcast, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::connection::Bus;
use crate::error::BusError;
use crate::journal::{Entry, entry};

/// Changes that a listener may be behind before it must look at everything again.
const CHANGES_KEPT: usize = 1_024;

/// How often it is looked whether the stream still is the one that was read, and holds what the view holds; and whether
/// the consumer's connection still stands.
const LOOK: Duration = Duration::from_secs(1);
const FOLLOW: &str = "follow the journal";

/// What listeners hear.
#[derive(Clone, Debug)]
pub enum News {
    Changed(Arc<Entry>),
    /// The stream was deleted, emptied or restored: the view holds what is there now, and nothing of before.
    BegunAnew,
}

/// The last record of every build; clones share it.
#[derive(Clone)]
pub struct View {
    shared: Arc<Shared>,
}

struct Shared {
    state: RwLock<State>,
    finished_kept: usize,
    sequence: watch::Sender<u64>,
    caught_up: watch::Sender<bool>,
    changes: broadcast::Sender<News>,
}

#[derive(Default)]
struct State {
    builds: HashMap<BuildId, (Arc<Entry>, u64)>,
    /// By the sequence of a build's first event: its place in a list.
    order: BTreeMap<u64, BuildId>,
    active: BTreeMap<u64, BuildId>,
    /// Those that are over, by the sequence of their end: whoever ended first is forgotten first.
    finished: BTreeMap<u64, BuildId>,
}

impl View {
    /// Begins to follow the journal until `stop`. Of the builds that are over, the newest `finished_kept` are held in memory;
    /// older ones are read from the stream.
    pub fn start(bus: &Bus, finished_kept: usize, tasks: &TaskTracker, stop: &CancellationToken) -> Self {
        let view = Self {
            shared: Arc::new(Shared {
                state: RwLock::default(),
                finished_kept,
                sequence: watch::Sender::new(0),
                caught_up: watch::Sender::new(false),
                changes: broadcast::Sender::new(CHANGES_KEPT),
            }),
        };
        let (follower, bus, stop) = (view.clone(), bus.clone(), stop.clone());
        tasks.spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = follower.follow(&bus) => {}
            }
        });
        view
    }

    /// A build's last event, if the view holds it.
    pub fn get(&self, id: &BuildId) -> Option<Arc<Entry>> {
        self.state().builds.get(id).map(|(entry, _)| entry.clone())
    }

    /// Every build that isn't over, the longest waiting first.
    pub fn active(&self) -> Vec<Arc<Entry>> {
        let state = self.state();
        state.active.values().filter_map(|id| state.builds.get(id)).map(|(entry, _)| entry.clone()).collect()
    }

    /// Builds newest first, those that were queued before the place `before`, each with its place.
    pub fn newest(
        &self,
        before: Option<u64>,
        mut wanted: impl FnMut(&Entry) -> bool,
        limit: usize,
    ) -> Vec<(u64, Arc<Entry>)> {
        let state = self.state();
        let range = state.order.range(..before.unwrap_or(u64::MAX)).rev();
        range
            .filter_map(|(place, id)| state.builds.get(id).map(|(entry, _)| (*place, entry.clone())))
            .filter(|(_, entry)| wanted(entry))
            .take(limit)
            .collect()
    }

    /// Every change from now on. A listener that lags must look at [`View::active`] again.
    pub fn changes(&self) -> broadcast::Receiver<News> {
        self.shared.changes.subscribe()
    }

    /// Waits until the view holds everything up to a sequence: a read of one's own append.
    pub async fn reached(&self, sequence: u64, within: Duration) -> bool {
        let mut seen = self.shared.sequence.subscribe();
        let reached = seen.wait_for(|at| *at >= sequence);
        matches!(tokio::time::timeout(within, reached).await, Ok(Ok(_)))
    }

    /// Whether it has read all that was there when it began.
    pub fn is_caught_up(&self) -> bool {
        *self.shared.caught_up.borrow()
    }

    /// Waits until [`View::is_caught_up`].
    pub async fn caught_up(&self) {
        let mut caught_up = self.shared.caught_up.subscribe();
        // Fails only when the view is gone, which holds the sender.
        let _ = caught_up.wait_for(|caught_up| *caught_up).await;
    }

    async fn follow(&self, bus: &Bus) {
        let mut pause = Duration::from_millis(100);
        let mut created = None;
        let mut said = false;
        loop {
            let before = *self.shared.sequence.borrow();
            if let Err(error) = self.follow_once(bus, &mut created).await {
                let read_on = *self.shared.sequence.borrow() > before;
                // Once for each cut, not for each try.
                if read_on || !said {
                    tracing::warn!("the view of the journal was cut off at {before}, and goes on: {error}");
                }
                said = true;
            }
            if *self.shared.sequence.borrow() > before {
                pause = Duration::from_millis(100);
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_secs(5));
        }
    }

    /// Reads on until the consumer ends. `created` is when the stream was made that the view has read, in nanoseconds since
    /// the epoch.
    async fn follow_once(&self, bus: &Bus, created: &mut Option<i128>) -> Result<(), BusError> {
        let times_lost = bus.times_lost();
        let stream = bus.call(FOLLOW, bus.js.get_stream(subject::JOURNAL_STREAM)).await?;
        let info = stream.cached_info();
        let made = info.created.unix_timestamp_nanos();
        if created.is_some_and(|created| created != made) || !self.is_of(&info.state) {
            self.begin_anew(&info.state);
        }
        *created = Some(made);
        let (last, from) = (info.state.last_sequence, *self.shared.sequence.borrow() + 1);
        if info.state.messages == 0 || last < from {
            self.shared.caught_up.send_replace(true);
        }
        let deliver_policy = DeliverPolicy::ByStartSequence { start_sequence: from };
        let consumer = stream.create_consumer(OrderedConfig { deliver_policy, ..Default::default() });
        let consumer = bus.call(FOLLOW, consumer).await?;
        let mut messages = bus.call(FOLLOW, consumer.messages()).await?;
        let mut read_by = None;
        let mut look = tokio::time::interval_at(tokio::time::Instant::now() + LOOK, LOOK);
        loop {
            let message = tokio::select! {
                message = messages.next() => message,
                // The consumer goes on by itself with a stream that was made anew, from where it was in the old one.
                _ = look.tick() => {
                    if bus.times_lost() != times_lost {
                        return Err(BusError::unavailable(FOLLOW, "the connection was lost"));
                    }
                    // One that does not answer says nothing.
                    if let Ok(now) = bus.call(FOLLOW, stream.get_info()).await
                        && (now.created.unix_timestamp_nanos() != made || !self.is_of(&now.state))
                    {
                        return Ok(());
                    }
                    continue;
                }
            };
            let Some(message) = message else {
                return Err(BusError::unavailable(FOLLOW, "the consumer ended"));
            };
            let message = message.map_err(|error| BusError::unavailable(FOLLOW, error))?;
            let info = message.info().map_err(|error| BusError::unavailable(FOLLOW, error))?;
            let stored_at = Timestamp::from_nanosecond(info.published.unix_timestamp_nanos())
                .map_err(|error| BusError::malformed(FOLLOW, error))?;
            let (sequence, pending) = (info.stream_sequence, info.pending);
            // The client makes another by itself, and tells nobody.
            if read_by.replace(info.consumer.to_owned()).is_some_and(|before| before != info.consumer) {
                bus.happened(
                    subject::JOURNAL_STREAM,
                    "consumer_gone",
                    "the consumer of a view was deleted, or went with its server: another was made, and nothing is missing",
                );
            }
            let empty = async_nats::HeaderMap::new();
            let headers = message.headers.as_ref().unwrap_or(&empty);
            match entry(&message.subject, sequence, stored_at, headers, &message.payload) {
                Ok(entry) => self.take(entry),
                // It must not stop the view: all other builds would stand still for it.
                Err(error) => tracing::error!("an event of the journal is left out: {error}"),
            }
            self.shared.sequence.send_replace(sequence);
            if sequence >= last || pending == 0 {
                self.shared.caught_up.send_if_modified(|caught_up| !std::mem::replace(caught_up, true));
            }
        }
    }

    /// Whether the view can be of a stream in this state: it has read no further, and holds no active build that the
    /// stream doesn't. Finished ones go by their age.
    fn is_of(&self, stream: &stream::State) -> bool {
        let state = self.state();
        let mut active = state.active.values().filter_map(|id| state.builds.get(id));
        *self.shared.sequence.borrow() <= stream.last_sequence
            && active.all(|(entry, _)| entry.sequence >= stream.first_sequence)
    }

    fn begin_anew(&self, stream: &stream::State) {
        // The keeper says whose doing it was.
        tracing::warn!(
            "the journal was deleted, emptied or restored, and holds events {} to {} now: builds that it doesn't hold are lost",
            stream.first_sequence,
            stream.last_sequence
        );
        self.shared.caught_up.send_replace(false);
        *self.shared.state.write().unwrap_or_else(PoisonError::into_inner) = State::default();
        self.shared.sequence.send_replace(0);
        // Nobody listens: nobody misses it.
        let _ = self.shared.changes.send(News::BegunAnew);
    }

    fn take(&self, entry: Entry) {
        let entry = Arc::new(entry);
        let id = entry.record.id.clone();
        {
            let mut state = self.shared.state.write().unwrap_or_else(PoisonError::into_inner);
            let place = state.builds.get(&id).map_or(entry.sequence, |(_, place)| *place);
            state.builds.insert(id.clone(), (entry.clone(), place));
            state.order.insert(place, id.clone());
            if entry.record.state.is_terminal() {
                state.active.remove(&place);
                state.finished.insert(entry.sequence, id);
            } else {
                state.active.insert(place, id);
            }
            state.forget_oldest(self.shared.finished_kept);
        }
        // Nobody listens: nobody misses it.
        let _ = self.shared.changes.send(News::Changed(entry));
    }

    fn state(&self) -> RwLockReadGuard<'_, State> {
        self.shared.state.read().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn forget_oldest(&mut self, finished_kept: usize) {
        while self.finished.len() > finished_kept {
            let Some((_, id)) = self.finished.pop_first() else { return };
            if let Some((_, place)) = self.builds.remove(&id) {
                self.order.remove(&place);
            }
        }
    }
}
