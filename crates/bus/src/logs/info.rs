//! What there is of a log, without reading it.

use kiln_domain::id::BuildId;

use super::{Logs, patiently};
use crate::error::BusError;

/// Which bytes of a log are there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Of the first byte that retention has kept.
    pub first: u64,
    /// The log's length: the offset of the byte that would follow.
    pub end: u64,
    /// Nothing follows.
    pub complete: bool,
}

impl Logs {
    /// What there is of a log, from the stream's leader. `None` where nothing is: nobody has claimed it yet, or retention has
    /// removed all of it. A bus that is away is waited for, half a minute.
    pub async fn extent(&self, id: &BuildId) -> Result<Option<Extent>, BusError> {
        let (first, tail) = patiently(async || {
            // The tail last: what is stored between the two makes the log longer, not shorter than its beginning.
            let first = self.next_from_leader(id, 1).await?;
            Ok((first, self.tail(id).await?))
        })
        .await?;
        let (Some(first), Some(tail)) = (first, tail) else { return Ok(None) };
        Ok(Some(Extent { first: first.offset(), end: tail.end, complete: tail.complete }))
    }
}
