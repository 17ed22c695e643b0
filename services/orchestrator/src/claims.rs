//! Claiming: which builds this process acts on, and when it may try.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use futures::{StreamExt as _, stream};
use kiln_bus::journal::{AppendError, Entry};
use kiln_domain::id::{BuildId, InstanceId};
use kiln_domain::rank::rank;
use kiln_domain::record::{Record, State};
use kiln_domain::run::Findings;
use kiln_domain::transition::Change;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::holder::wall_clock;
use crate::{Shared, holder, queue};

/// Live orchestrators are ranked for each build: the first tries at once, each other this much later.
const RANK_STEP: Duration = Duration::from_millis(20);
/// Everything is looked at again this often, whatever was told.
const SWEEP: Duration = Duration::from_secs(1);
/// So many claims are appended at once; the bus has others to serve.
const CLAIMS_AT_ONCE: usize = 16;

/// Claims builds and holds them until `stop`; then lets go of each.
pub(crate) async fn keep(shared: &Arc<Shared>, stop: &CancellationToken) {
    let mut claims = Claims::default();
    let mut changes = shared.view.changes();
    let mut holders = shared.holders.changes();
    loop {
        // A claim that is dropped half made is as one of a process that died: our lease ends, and another takes it over.
        let claiming = claims.claim_what_may_be(shared, stop);
        let Some(wake) = stop.run_until_cancelled(claiming).await else { break };
        tokio::select! {
            () = stop.cancelled() => break,
            // A lag makes us look again, as does any change.
            _ = changes.recv() => {}
            _ = holders.changed() => {}
            Some(ended) = claims.held.join_next_with_id() => claims.ended(ended),
            () = tokio::time::sleep(wake) => {}
        }
    }
    while let Some(ended) = claims.held.join_next_with_id().await {
        claims.ended(ended);
    }
}

#[derive(Default)]
struct Claims {
    /// A task for each build that we hold; it gives the event with which it ended our claim, or 0.
    held: JoinSet<u64>,
    names: HashMap<BuildId, tokio::task::Id>,
    /// Builds whose claim we ended, with the event that did: the view may be behind that for a moment.
    let_go: HashMap<BuildId, u64>,
    /// Since when we see a build that anybody may claim.
    free_since: HashMap<BuildId, Instant>,
}

impl Claims {
    fn ended(&mut self, ended: Result<(tokio::task::Id, u64), tokio::task::JoinError>) {
        let (task, known) = match ended {
            Ok((task, known)) => (task, known),
            Err(error) => {
                tracing::error!("the task that held a build failed: {error}");
                (error.id(), 0)
            }
        };
        let id = self.names.iter().find(|(_, held)| **held == task).map(|(id, _)| id.clone());
        if let Some(id) = id {
            self.names.remove(&id);
            self.let_go.insert(id, known);
        }
    }

    /// Claims what it is our turn to; says when to look again at the latest.
    async fn claim_what_may_be(&mut self, shared: &Arc<Shared>, stop: &CancellationToken) -> Duration {
        let Some(me) = shared.holders.me().filter(|_| !stop.is_cancelled()) else { return SWEEP };
        let mut active = shared.view.active();
        self.let_go.retain(|id, known| shared.view.get(id).is_some_and(|entry| entry.sequence < *known));
        active.retain(|entry| {
            // Of a newer release's state this one knows no rule.
            !self.let_go.contains_key(&entry.record.id) && entry.record.state != State::Unknown
        });
        let (claimed, free): (Vec<_>, Vec<_>) = active
            .iter()
            .partition(|entry| entry.record.claimed_by.as_ref().is_some_and(|by| shared.holders.is_live(by)));
        shared.metrics.running.set(i64::try_from(self.names.len()).unwrap_or(i64::MAX));
        shared.metrics.queued.set(
            i64::try_from(active.iter().filter(|entry| entry.record.waits()).count()).unwrap_or(i64::MAX),
        );
        // Our own claim without a task: the append's answer was lost, or its task failed.
        for entry in &claimed {
            if entry.record.claimed_by.as_ref() == Some(&me) && !self.names.contains_key(&entry.record.id) {
                self.hold(shared, Entry::clone(entry), stop);
            }
        }
        let ids: HashSet<&BuildId> = free.iter().map(|entry| &entry.record.id).collect();
        self.free_since.retain(|id, _| ids.contains(id));
        let clock = wall_clock();
        let (expired, free): (Vec<&Arc<Entry>>, Vec<&Arc<Entry>>) = free
            .into_iter()
            .filter(|entry| !self.names.contains_key(&entry.record.id))
            .partition(|entry| entry.record.has_waited_too_long(clock));
        let (never_claimed, expired): (Vec<&Arc<Entry>>, Vec<&Arc<Entry>>) =
            expired.into_iter().partition(|entry| entry.record.claims == 0);
        let limit = shared.config.max_running_per_owner;
        let (mut queued, to_end_or_adopt): (Vec<&Arc<Entry>>, Vec<&Arc<Entry>>) =
            free.into_iter().partition(|entry| needs_a_slot(&entry.record));
        // One that can't be started for now keeps no other from its turn; what this release can't start is left to those
        // that can.
        queued.retain(|entry| {
            entry.record.source.is_known() && entry.record.not_before().is_none_or(|at| at <= clock)
        });
        let slots = shared.config.slots.saturating_sub(self.names.len());
        let waiting: Vec<&Record> = queued.iter().map(|entry| &entry.record).collect();
        let running: Vec<&Record> = claimed.iter().map(|entry| &entry.record).collect();
        let turns = queue::next(&waiting, &running, slots, limit);
        let turns: HashSet<&BuildId> = turns.iter().map(|record| &record.id).collect();
        let turns: Vec<_> = queued.iter().filter(|entry| turns.contains(&entry.record.id)).collect();

        let live = shared.holders.live();
        let now = Instant::now();
        let mut wake = SWEEP;
        let mut due = Vec::new();
        for entry in never_claimed.iter().chain(&expired).chain(&to_end_or_adopt).chain(turns) {
            let id = &entry.record.id;
            let steps = u32::try_from(rank(id.as_str(), &me, &live)).unwrap_or(u32::MAX);
            let at = *self.free_since.entry(id.clone()).or_insert(now) + RANK_STEP.saturating_mul(steps);
            if at > now {
                wake = wake.min(at - now);
            } else {
                due.push(Arc::clone(entry));
            }
        }
        // Side by side: the last of many would else wait for the appends of all before it.
        let claiming = due.into_iter().map(|entry| {
            let (claimed, me) = (&claimed, &me);
            async move {
                if entry.record.claims > 0 || !entry.record.has_waited_too_long(clock) {
                    return claim(shared, entry, me).await;
                }
                let owner = &entry.record.owner;
                let running = claimed.iter().filter(|other| other.record.owner == *owner).count();
                let complaint = (running >= limit)
                    .then(|| format!("its owner has {running} builds running, and may have {limit}"));
                expire(shared, &entry, complaint.as_deref(), me).await;
                None
            }
        });
        let mut claiming = stream::iter(claiming).buffer_unordered(CLAIMS_AT_ONCE);
        while let Some(claimed) = claiming.next().await {
            if let Some(claimed) = claimed {
                self.hold(shared, claimed, stop);
            }
        }
        wake
    }

    fn hold(&mut self, shared: &Arc<Shared>, entry: Entry, stop: &CancellationToken) {
        let id = entry.record.id.clone();
        let (shared, stop) = (shared.clone(), stop.clone());
        let task = self.held.spawn(async move { holder::hold(&shared, entry, &stop).await });
        self.names.insert(id, task.id());
    }
}

/// Adopting a running builder, or ending a build, needs no free slot: only a start does.
fn needs_a_slot(record: &Record) -> bool {
    record.handle.is_none() && record.cancel.is_none()
}

/// Ends a build that nobody ever claimed: any orchestrator may.
async fn expire(shared: &Shared, entry: &Arc<Entry>, complaint: Option<&str>, me: &InstanceId) {
    let failure = entry.record.queue_expired(complaint);
    let change = Change::Failed { by: None, failure, findings: Findings::default() };
    match shared.journal.append(Some(entry), &change, me).await {
        Ok(over) => shared.metrics.ended(&over),
        Err(AppendError::Lost | AppendError::Gone) => {}
        Err(error) => {
            let id = &entry.record.id;
            tracing::warn!(build.id = %id, "that the time of `{id}` in the queue is up can't be said now: {error}");
        }
    }
}

async fn claim(shared: &Shared, entry: Arc<Entry>, me: &InstanceId) -> Option<Entry> {
    let id = &entry.record.id;
    if let Some(last) = &entry.record.claimed_by {
        match shared.holders.confirm_dead(last).await {
            Ok(true) => {
                tracing::info!(build.id = %id, "taking build `{id}` over from {last}, whose lease has ended")
            }
            Ok(false) => return None,
            Err(error) => {
                tracing::warn!(build.id = %id, "build `{id}` can't be taken over from {last} now: {error}");
                return None;
            }
        }
    }
    match shared.journal.append(Some(&entry), &Change::Claimed { by: me.clone() }, me).await {
        Ok(claimed) => Some(claimed),
        Err(AppendError::Lost | AppendError::Gone) => None,
        Err(error) => {
            tracing::warn!(build.id = %id, "build `{id}` could not be claimed: {error}");
            None
        }
    }
}
