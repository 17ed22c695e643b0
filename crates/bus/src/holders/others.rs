//! The watch of everybody's leases.

use std::collections::BTreeMap;
use std::time::Duration;

use async_nats::jetstream::kv::Operation;
use async_nats::jetstream::stream;
use futures::StreamExt as _;
use kiln_domain::id::InstanceId;
use tokio::time::{Instant, MissedTickBehavior, interval_at, timeout};

use super::Holders;
use crate::error::BusError;

const WATCH: &str = "watch leases";
/// How often a watch looks whether its connection still stands.
const LOOK: Duration = Duration::from_secs(1);
/// How often it looks whether its bucket is the one that it began with.
const LOOK_AT_BUCKET: Duration = Duration::from_secs(5);

impl Holders {
    pub(super) async fn keep_watching(&self) {
        let mut said = false;
        loop {
            let begun = Instant::now();
            if let Err(error) = self.watch_once().await {
                // Once for each cut, not for each try.
                if !said || begun.elapsed() > self.shared.lease.ttl() {
                    tracing::warn!("the watch of the leases was cut off, and is begun again: {error}");
                }
                said = true;
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }

    async fn watch_once(&self) -> Result<(), BusError> {
        let failed = |error: &dyn std::fmt::Display| BusError::unavailable(WATCH, error);
        let (bus, stream) = (&self.shared.bus, &self.shared.store.stream);
        let made = bus.call(WATCH, stream.get_info()).await?.created;
        let mut watch = bus.call(WATCH, self.shared.store.watch_with_history(">")).await?;
        // Each with the place of its lease in the bucket.
        let mut seen: BTreeMap<InstanceId, u64> = BTreeMap::new();
        let mut delivered = 0;
        let times_lost = bus.times_lost();
        let mut look = interval_at(Instant::now() + LOOK, LOOK);
        let mut look_at_bucket = interval_at(Instant::now() + LOOK_AT_BUCKET, LOOK_AT_BUCKET);
        look_at_bucket.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let entry = tokio::select! {
                entry = watch.next() => match entry {
                    Some(entry) => entry.map_err(|error| failed(&error))?,
                    None => return Ok(()),
                },
                _ = look.tick() => {
                    if bus.times_lost() != times_lost {
                        return Err(failed(&"the connection was lost"));
                    }
                    continue;
                }
                _ = look_at_bucket.tick() => {
                    // The client's consumer goes on in a bucket that was made anew from where it was in the old one, and so
                    // sees nothing for days; and a purge leaves no markers of whom it took.
                    let Ok(Ok(now)) = timeout(LOOK, bus.call(WATCH, stream.get_info())).await else { continue };
                    if now.created != made || has_been_emptied(&now.state, delivered, &seen) {
                        tracing::warn!("the bucket of leases was deleted or emptied: its watch is begun again");
                        return Ok(());
                    }
                    continue;
                }
            };
            delivered = delivered.max(entry.revision);
            if let Ok(instance) = entry.key.parse::<InstanceId>() {
                match entry.operation {
                    Operation::Put => seen.insert(instance, entry.revision),
                    Operation::Delete | Operation::Purge => seen.remove(&instance),
                };
            }
            if !entry.seen_current {
                // Still reading what was there: who hasn't been read yet is not gone.
                continue;
            }
            self.shared.live.send_if_modified(|live| {
                let changed = !live.iter().eq(seen.keys());
                *live = seen.keys().cloned().collect();
                changed
            });
        }
    }
}

/// Whether leases that were seen are in the bucket no more, though nobody told that they ended. What was written while the
/// bucket was asked is still on its way to us: then it isn't known yet.
fn has_been_emptied(now: &stream::State, delivered: u64, seen: &BTreeMap<InstanceId, u64>) -> bool {
    delivered >= now.last_sequence && seen.values().any(|at| *at < now.first_sequence)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_renewal_that_is_on_its_way_is_not_taken_for_a_purge() {
        let instance = InstanceId::new("orchestrator", 1).unwrap();
        let state = |first: u64, last: u64| -> stream::State {
            let state = serde_json::json!({
                "messages": 1, "bytes": 1, "first_seq": first, "last_seq": last, "consumer_count": 1,
                "first_ts": "2026-01-01T00:00:00Z", "last_ts": "2026-01-01T00:00:00Z",
            });
            serde_json::from_value(state).unwrap()
        };
        let seen = BTreeMap::from([(instance, 5)]);
        assert!(!has_been_emptied(&state(5, 5), 5, &seen), "as it was");
        assert!(!has_been_emptied(&state(6, 6), 5, &seen), "renewed, which we have not heard");
        assert!(has_been_emptied(&state(6, 5), 5, &seen), "purged");
        assert!(has_been_emptied(&state(7, 7), 7, &seen), "purged, and another came");
    }
}
