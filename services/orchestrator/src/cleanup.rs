//! Cleaning up: the keys of `KILN_SECRETS` are the builds of which something may be left. Where an active build has lost its
//! key, it gets another.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use kiln_bus::BusError;
use kiln_bus::view::News;
use kiln_domain::engine::Observed;
use kiln_domain::id::{BuildId, RunId};
use kiln_domain::limits;
use kiln_domain::rank::rank;
use tokio::time::Instant;

use crate::Shared;

const SWEEP: Duration = Duration::from_secs(5);
/// An entry whose build does not appear for so long is an accept that never happened.
const NEVER_ACCEPTED: Duration = Duration::from_secs(120);

/// Removes what is left of builds that are over. It may be dropped anywhere: the list of what to do stays.
pub(crate) async fn keep(shared: &Arc<Shared>) {
    let mut without_build: HashMap<BuildId, Instant> = HashMap::new();
    let mut changes = shared.view.changes();
    loop {
        sweep(shared, &mut without_build).await;
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

async fn sweep(shared: &Shared, without_build: &mut HashMap<BuildId, Instant>) {
    let Some(me) = shared.holders.me() else { return };
    let builds = match shared.secrets.builds().await {
        Ok(builds) => builds,
        Err(error) => {
            tracing::warn!("what is to be cleaned up can't be listed now: {error}");
            return;
        }
    };
    without_build.retain(|id, _| builds.contains(id));
    let live = shared.holders.live();
    let listed: HashSet<&BuildId> = builds.iter().collect();
    for active in shared.view.active() {
        let id = &active.record.id;
        if !listed.contains(id)
            && rank(id.as_str(), &me, &live) == 0
            && let Err(error) = list_again(shared, id).await
        {
            tracing::warn!(build.id = %id, "whether `{id}` is listed for the clean-up can't be seen to now: {error}");
        }
    }
    for id in builds.iter().filter(|id| rank(id.as_str(), &me, &live) == 0) {
        if let Err(error) = clean_up(shared, id, without_build).await {
            tracing::warn!(build.id = %id, "build `{id}` can't be cleaned up yet: {error:#}");
        }
    }
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
            "the secrets of `{id}` are lost: its entry in KILN_SECRETS was removed; if it has not started yet it fails, \
             and what its builder says is withheld"
        );
    }
    Ok(())
}

async fn clean_up(
    shared: &Shared,
    id: &BuildId,
    without_build: &mut HashMap<BuildId, Instant>,
) -> anyhow::Result<()> {
    let entry = match shared.view.get(id) {
        Some(entry) => Some((*entry).clone()),
        None => shared.journal.last_of_build(id).await?,
    };
    let Some(entry) = entry else {
        let since = *without_build.entry(id.clone()).or_insert_with(Instant::now);
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
