//! Cleaning up: the keys of `KILN_SECRETS` are the builds of which something may be left. Where an active build has lost its
//! key, it gets another.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kiln_bus::BusError;
use kiln_bus::view::News;
use kiln_domain::engine::Observed;
use kiln_domain::id::{BuildId, RunId};
use kiln_domain::limits;
use kiln_domain::rank::rank;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::Shared;

const SWEEP: Duration = Duration::from_secs(5);
/// An entry whose build does not appear for so long is an accept that never happened.
const NEVER_ACCEPTED: Duration = Duration::from_secs(120);

/// So many builds are cleaned up side by side: one whose run resists for minutes keeps no other waiting.
const AT_ONCE: usize = 8;

/// Removes what is left of builds that are over. It may be dropped anywhere: the list of what to do stays.
pub(crate) async fn keep(shared: &Arc<Shared>) {
    let mut cleaning = Cleaning::new();
    let mut changes = shared.view.changes();
    loop {
        cleaning.sweep(shared).await;
        // The end of a build is worth a look; its log ends a moment later.
        let ended = async {
            loop {
                match changes.recv().await {
                    Ok(News::Changed(entry)) if !entry.record.state.is_terminal() => {}
                    _ => return tokio::time::sleep(Duration::from_secs(1)).await,
                }
            }
        };
        tokio::select! {
            () = ended => {}
            () = tokio::time::sleep(SWEEP) => {}
        }
    }
}

struct Cleaning {
    tasks: JoinSet<()>,
    under_way: HashMap<tokio::task::Id, BuildId>,
    slots: Arc<Semaphore>,
    without_build: Arc<Mutex<WithoutBuild>>,
}

/// Entries whose builds the journal doesn't know, and since when we see them.
type WithoutBuild = HashMap<BuildId, Instant>;

impl Cleaning {
    fn new() -> Self {
        Self {
            tasks: JoinSet::new(),
            under_way: HashMap::new(),
            slots: Arc::new(Semaphore::new(AT_ONCE)),
            without_build: Arc::default(),
        }
    }

    /// Begins to clean up each build that is ours to, but for those that it is at already.
    async fn sweep(&mut self, shared: &Arc<Shared>) {
        while let Some(ended) = self.tasks.try_join_next_with_id() {
            let task = match ended {
                Ok((task, ())) => task,
                Err(error) => {
                    tracing::error!("the task that cleaned a build up failed: {error}");
                    error.id()
                }
            };
            self.under_way.remove(&task);
        }
        let Some(me) = shared.holders.me() else { return };
        let builds: HashSet<BuildId> = match shared.secrets.builds().await {
            Ok(builds) => builds.into_iter().collect(),
            Err(error) => {
                tracing::warn!("what is to be cleaned up can't be listed now: {error}");
                return;
            }
        };
        lock(&self.without_build).retain(|id, _| builds.contains(id));
        let live = shared.holders.live();
        for active in shared.view.active() {
            let id = &active.record.id;
            if !builds.contains(id)
                && rank(id.as_str(), &me, &live) == 0
                && let Err(error) = list_again(shared, id).await
            {
                tracing::warn!(build.id = %id, "whether `{id}` is listed for the clean-up can't be seen to now: {error}");
            }
        }
        let under_way: HashSet<BuildId> = self.under_way.values().cloned().collect();
        for id in builds {
            if rank(id.as_str(), &me, &live) == 0 && !under_way.contains(&id) {
                self.begin(shared, id);
            }
        }
    }

    fn begin(&mut self, shared: &Arc<Shared>, id: BuildId) {
        let (shared, of) = (shared.clone(), id.clone());
        let (slots, without_build) = (self.slots.clone(), self.without_build.clone());
        let task = self.tasks.spawn(async move {
            // Fails only where the semaphore is closed, which nobody does.
            let _slot = slots.acquire().await;
            if let Err(error) = clean_up(&shared, &of, &without_build).await {
                tracing::warn!(build.id = %of, "build `{of}` can't be cleaned up yet: {error:#}");
            }
        });
        self.under_way.insert(task.id(), id);
    }
}

/// A poisoned lock's content is still whole here: each change of it is one call.
fn lock(without_build: &Mutex<WithoutBuild>) -> MutexGuard<'_, WithoutBuild> {
    without_build.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A build has its entry from before it is accepted until it is cleaned up; one that has none has lost it to somebody's hand.
/// Without an entry nobody would remove its runs.
async fn list_again(shared: &Shared, id: &BuildId) -> Result<(), BusError> {
    // The view may be behind a build that is cleaned up by now.
    let last = shared.journal.last_of_build(id).await?;
    let active = last.is_some_and(|last| !last.record.state.is_terminal());
    if active && shared.secrets.list_without_secrets(id).await? {
        shared.metrics.lost_secrets();
        tracing::error!(
            build.id = %id,
            "the secrets of `{id}` are lost: its entry in KILN_SECRETS was removed; if it has not started yet it fails; \
             what its builder says is withheld by whoever has not read them before"
        );
    }
    Ok(())
}

async fn clean_up(shared: &Shared, id: &BuildId, without_build: &Mutex<WithoutBuild>) -> anyhow::Result<()> {
    let entry = match shared.view.get(id) {
        Some(entry) => Some((*entry).clone()),
        None => shared.journal.last_of_build(id).await?,
    };
    let Some(entry) = entry else {
        let since = *lock(without_build).entry(id.clone()).or_insert_with(Instant::now);
        if since.elapsed() > NEVER_ACCEPTED {
            // Mostly there are no runs. Where the journal lost the build there may be some, which nobody holds.
            for run in (1..=limits::ATTEMPTS).map(|attempt| RunId::new(id, attempt)) {
                if !matches!(shared.engine.observe(&run).await?, Observed::Absent) {
                    shared.engine.cancel(&run).await?;
                    shared.engine.remove(&run).await?;
                }
            }
            shared.secrets.remove(id).await?;
        }
        return Ok(());
    };
    if !entry.record.state.is_terminal() {
        return Ok(());
    }
    // The relays complete the log of every build, whatever became of it; the output must be there until they have.
    if !shared.logs.tail(id).await?.is_some_and(|tail| tail.complete) {
        return Ok(());
    }
    for attempt in 1..=entry.record.attempt {
        shared.engine.remove(&RunId::new(id, attempt)).await?;
    }
    shared.secrets.remove(id).await?;
    tracing::debug!(build.id = %id, "build `{id}` is cleaned up");
    Ok(())
}
