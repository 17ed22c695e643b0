//! From an offset to the message that holds it: a search over the stream's sequences, never a scan.
//!
//! Every second look is where the offset should be if the log grew evenly, which is right for most at once; the others halve
//! what is left, so that no log takes more than twice a binary search.

use kiln_domain::id::BuildId;

use super::message::LogMessage;
use super::{LogError, LogTail, Logs, patiently};

/// Where no message at or before an offset is any more.
#[derive(Clone, Copy)]
struct Place {
    sequence: u64,
    /// Of the first message from there on, or the log's end.
    offset: u64,
}

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
        let mut low = first;
        let mut high = Place { sequence: tail.sequence + 1, offset: tail.end };
        let mut guess = true;
        // The wanted message is `low` or between the two.
        while low.meta.end <= offset && high.sequence.saturating_sub(low.sequence) > 1 {
            let middle =
                if guess { between(&low, high, offset) } else { low.sequence.midpoint(high.sequence) };
            guess = !guess;
            match self.message_at_or_after(id, middle).await? {
                Some(message) if message.sequence < high.sequence && message.offset() <= offset => {
                    low = message
                }
                Some(message) if message.sequence < high.sequence => {
                    high = Place { sequence: middle, offset: message.offset() };
                }
                _ => high.sequence = middle,
            }
        }
        Ok(low.sequence)
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

/// The sequence at which to look for a message, strictly between the two. As it is the next one from there that is found, the
/// aim is a message's length before the offset.
fn between(low: &LogMessage, high: Place, offset: u64) -> u64 {
    let gap = high.sequence - low.sequence;
    let aim = (offset - low.offset()).saturating_sub(low.bytes.len() as u64);
    let bytes = high.offset.saturating_sub(low.offset()).max(1);
    let share = u128::from(aim) * u128::from(gap) / u128::from(bytes);
    low.sequence + u64::try_from(share).unwrap_or(u64::MAX).clamp(1, gap - 1)
}
