//! Batches of stored messages, fetched once for all who read the same log at about the same time.

use std::sync::Arc;
use std::time::Duration;

use kiln_domain::id::BuildId;
use moka::future::Cache;

use super::message::LogMessage;
use super::{LogError, Logs, patiently};
use crate::error::BusError;

/// Messages of one replay step.
const BATCH: usize = 64;
/// Bytes of messages that are held for the next reader.
const HELD_BYTES: u64 = 32 << 20;
/// Readers that began together stay about this close to each other; and so long may be read what retention has removed.
const HELD_FOR: Duration = Duration::from_secs(2);
/// What a message takes beside its bytes.
const OVERHEAD: usize = 512;

/// Messages from a sequence on. What is stored never changes, so that an old batch is at most a short one;
/// but see [`Logs::forget_batches`].
pub(super) type Batches = Cache<(BuildId, u64), Arc<[LogMessage]>>;

pub(super) fn batches() -> Batches {
    Cache::builder()
        .max_capacity(HELD_BYTES)
        .weigher(|_, batch: &Arc<[LogMessage]>| {
            let bytes: usize = batch.iter().map(|message| message.bytes.len() + OVERHEAD).sum();
            u32::try_from(bytes).unwrap_or(u32::MAX)
        })
        .time_to_live(HELD_FOR)
        .build()
}

impl Logs {
    /// What follows at sequence `from`: at least one message, unless retention was quicker. From any replica; where that one is
    /// behind, from the leader. Equal questions at once are one.
    pub(super) async fn replay(&self, id: &BuildId, from: u64) -> Result<Arc<[LogMessage]>, LogError> {
        let load = patiently(async || {
            let mut fetched = self.fetch(id, from, BATCH).await?;
            if fetched.is_empty() {
                fetched.extend(self.next_from_leader(id, from).await?);
            }
            Ok(fetched.into())
        });
        let batch = self.shared.batches.try_get_with((id.clone(), from), load).await;
        let batch: Arc<[LogMessage]> = batch.map_err(|error: Arc<BusError>| BusError::clone(&error))?;
        if batch.is_empty() {
            // Nobody shall hear of that later: there may be something then.
            self.shared.batches.invalidate(&(id.clone(), from)).await;
        }
        Ok(batch)
    }
    /// What is held is of a stream that is no more: its sequences mean other messages now.
    pub(super) fn forget_batches(&self) {
        self.shared.batches.invalidate_all();
    }
}
