//! Which logs this relay tends: those of all active builds, and of all finished ones that aren't cleaned up yet.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use kiln_bus::journal::{Entry, Journal};
use kiln_bus::logs::AppendError;
use kiln_bus::view::{News, View};
use kiln_domain::id::{BuildId, InstanceId};
use tokio::sync::{broadcast, watch};
use tokio::task::{Id, JoinSet};
use tokio_util::sync::CancellationToken;

use crate::relay::{Left, Shared, Trouble, tend};

/// Decides for every build whether this process writes its log.
pub(crate) struct Relays {
    shared: Arc<Shared>,
    view: View,
    journal: Journal,
    /// Who this process is while the tasks run.
    me: Option<InstanceId>,
    tasks: JoinSet<Ended>,
    tended: HashMap<BuildId, watch::Sender<Arc<Entry>>>,
    by_task: HashMap<Id, BuildId>,
    /// Logs that live relays write.
    elsewhere: HashMap<BuildId, InstanceId>,
}

type Ended = Result<Left, Trouble>;

/// How often leases are looked at; a change of them is heard at once.
const LOOK: Duration = Duration::from_secs(1);
/// How often the list of builds that aren't cleaned up is read.
const SWEEP: Duration = Duration::from_secs(30);
/// A log that was left in trouble is tried again after about this long.
const AGAIN: Duration = Duration::from_millis(500);

impl Relays {
    pub(crate) fn new(shared: Arc<Shared>, view: View, journal: Journal) -> Self {
        Self {
            shared,
            view,
            journal,
            me: None,
            tasks: JoinSet::new(),
            tended: HashMap::new(),
            by_task: HashMap::new(),
            elsewhere: HashMap::new(),
        }
    }

    /// Tends logs until `stop`. What isn't stored then is read again by whoever goes on.
    pub(crate) async fn run(&mut self, stop: &CancellationToken) {
        let mut changes = self.view.changes();
        let mut leases = self.shared.holders.changes();
        let mut look = tokio::time::interval(LOOK);
        let mut sweep = tokio::time::interval(SWEEP);
        self.be_who_we_are().await;
        self.tend_all_active();
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                change = changes.recv() => match change {
                    Ok(News::Changed(entry)) => self.take(entry),
                    // A task that waits for a build's end would wait for ever where the journal lost the build.
                    Ok(News::BegunAnew) => {
                        self.drop_all().await;
                        self.tend_all_active();
                    }
                    Err(broadcast::error::RecvError::Lagged(_)) => self.tend_all_active(),
                    Err(broadcast::error::RecvError::Closed) => break,
                },
                Some(ended) = self.tasks.join_next_with_id() => self.ended(ended),
                // Fails only when the holders are gone, which `shared` holds.
                _ = leases.changed() => {
                    leases.borrow_and_update();
                    self.take_over();
                }
                _ = look.tick() => {
                    if self.be_who_we_are().await {
                        self.tend_all_active();
                        sweep.reset_immediately();
                    }
                    self.take_over();
                }
                _ = sweep.tick() => self.sweep().await,
            }
        }
        self.drop_all().await;
    }

    /// Follows the lease: without one nothing is written, under a new one all is claimed anew. Whether it changed.
    async fn be_who_we_are(&mut self) -> bool {
        let me = self.shared.holders.me();
        if me == self.me {
            return false;
        }
        self.drop_all().await;
        self.me = me;
        self.me.is_some()
    }

    async fn drop_all(&mut self) {
        self.tasks.shutdown().await;
        self.tended.clear();
        self.by_task.clear();
        self.elsewhere.clear();
    }

    fn tend_all_active(&mut self) {
        // Of those that are over meanwhile, too: their tasks wait to hear it.
        let mut entries: Vec<_> = self.tended.keys().filter_map(|id| self.view.get(id)).collect();
        entries.extend(self.view.active());
        for entry in entries {
            self.take(entry);
        }
    }

    /// A build's last event: told to its task, or the reason to begin one.
    fn take(&mut self, entry: Arc<Entry>) {
        let id = &entry.record.id;
        match self.tended.get(id) {
            Some(task) => {
                task.send_if_modified(|known| {
                    let newer = entry.sequence > known.sequence;
                    if newer {
                        known.clone_from(&entry);
                    }
                    newer
                });
            }
            None if self.elsewhere.contains_key(id) => {}
            None => self.begin(entry, Duration::ZERO),
        }
    }

    fn begin(&mut self, entry: Arc<Entry>, after: Duration) {
        let Some(me) = self.me.clone() else { return };
        let id = entry.record.id.clone();
        let (sender, entries) = watch::channel(entry);
        let (shared, of) = (self.shared.clone(), id.clone());
        let task = self.tasks.spawn(async move {
            tokio::time::sleep(after).await;
            tend(&shared, &of, &me, entries).await
        });
        self.by_task.insert(task.id(), id.clone());
        self.tended.insert(id, sender);
    }

    fn ended(&mut self, ended: Result<(Id, Ended), tokio::task::JoinError>) {
        let (task, left) = match ended {
            Ok((task, left)) => (task, Some(left)),
            Err(error) => {
                tracing::error!("a log's task failed: {error}");
                (error.id(), None)
            }
        };
        let Some(id) = self.by_task.remove(&task) else { return };
        let Some(known) = self.tended.remove(&id).map(|sender| sender.borrow().clone()) else { return };
        match left {
            Some(Ok(Left::Complete)) => {}
            Some(Ok(Left::Elsewhere(writer))) => {
                self.elsewhere.insert(id, writer);
            }
            Some(Err(error)) => {
                // To be replaced is how a race for a log ends: nothing to look at.
                match error {
                    Trouble::Append(AppendError::Replaced { .. }) => {
                        tracing::debug!(build.id = %id, "{error}")
                    }
                    _ => tracing::warn!(build.id = %id, "the log of {id} was left, trying again: {error}"),
                }
                self.begin(known, AGAIN);
            }
            None => self.begin(known, AGAIN),
        }
    }

    /// Looks again at the logs whose writers live no more.
    fn take_over(&mut self) {
        let free: Vec<_> = self
            .elsewhere
            .iter()
            .filter(|(_, writer)| !self.shared.holders.is_live(writer))
            .map(|(id, _)| id.clone())
            .collect();
        for id in free {
            // One that the view has forgotten is found by the sweep.
            self.elsewhere.remove(&id);
            if let Some(entry) = self.view.get(&id) {
                self.take(entry);
            }
        }
    }

    /// Every build that isn't cleaned up has its log completed, whatever happened to whom.
    async fn sweep(&mut self) {
        let listed = match self.shared.secrets.builds().await {
            Ok(listed) => listed,
            Err(error) => {
                tracing::warn!("the builds that aren't cleaned up can't be listed: {error}");
                return;
            }
        };
        let keep: BTreeSet<_> = listed.iter().collect();
        self.elsewhere.retain(|id, _| keep.contains(id));
        for id in &listed {
            if self.tended.contains_key(id) || self.elsewhere.contains_key(id) {
                continue;
            }
            match self.entry(id).await {
                Ok(Some(entry)) => self.take(entry),
                // Accepted never: the orchestrators remove it.
                Ok(None) => {}
                Err(error) => tracing::warn!(build.id = %id, "the build {id} can't be read: {error}"),
            }
        }
    }

    async fn entry(&self, id: &BuildId) -> Result<Option<Arc<Entry>>, kiln_bus::BusError> {
        match self.view.get(id) {
            Some(entry) => Ok(Some(entry)),
            None => Ok(self.journal.last_of_build(id).await?.map(Arc::new)),
        }
    }
}
