//! From an offset to the message that holds it: a binary search over the stream's sequences, never a scan.

use kiln_domain::id::BuildId;

use super::message::LogMessage;
use super::{LogError, LogTail, Logs, patiently};

impl Logs {
    /// The sequence of a message from which on a read finds `offset`, which is at most the tail's end.
    ///
    /// [`LogError::Discarded`] where the log begins behind `offset` now.
    pub(super) async fn seek(&self, id: &BuildId, offset: u64, tail: &LogTail) -> Result<u64, LogError> {
        let Some(first) = self.message_at_or_after(id, 1).await? else {
            return Err(LogError::NotFound { id: id.clone() });
        };
        if first.offset() > offset {
            return Err(LogError::Discarded { id: id.clone(), wanted: offset, first: first.offset() });
        }
        // `low` is the sequence of a message that begins at or before the offset; none at or after `high` does that
        // needs to be looked at.
        let (mut low, mut high) = (first.sequence, tail.sequence + 1);
        while high.saturating_sub(low) > 1 {
            let middle = low + (high - low) / 2;
            match self.message_at_or_after(id, middle).await? {
                Some(message) if message.sequence < high && message.offset() <= offset => {
                    low = message.sequence
                }
                _ => high = middle,
            }
        }
        Ok(low)
    }

    /// The first offset that is still there.
    pub(super) async fn first_offset(&self, id: &BuildId) -> Result<u64, LogError> {
        let first = self.message_at_or_after(id, 1).await?;
        first.map(|first| first.offset()).ok_or_else(|| LogError::NotFound { id: id.clone() })
    }

    async fn message_at_or_after(&self, id: &BuildId, sequence: u64) -> Result<Option<LogMessage>, LogError> {
        let found = patiently(|| self.fetch(id, sequence, 1)).await?;
        match found.into_iter().next() {
            Some(message) => Ok(Some(message)),
            // A replica may not have it yet.
            None => Ok(patiently(|| self.next_from_leader(id, sequence)).await?),
        }
    }
}
