//! What there is of a log, and of all logs, without reading them.

use std::time::Duration;

use futures::TryStreamExt as _;
use jiff::Timestamp;
use kiln_contract::subject;
use kiln_domain::id::BuildId;

use super::message::LogMessage;
use super::{Logs, READ, message_of, patiently};
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

/// What is to be said of a log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogInfo {
    pub extent: Extent,
    /// Messages that hold it.
    pub chunks: u64,
    /// The builder wrote more than a log may hold: its end is a line that says so.
    pub limited: bool,
    /// When the first byte that is kept was stored, and the last.
    pub stored: (Timestamp, Timestamp),
    /// The size limit of this log, where its writer has said it.
    pub max_bytes: Option<u64>,
    /// After so long each byte is removed; the size of all logs may have it removed earlier.
    pub max_age: Duration,
    /// What all logs together take in the stream, and what they may; `None` is no limit.
    pub all_bytes: u64,
    pub all_max_bytes: Option<u64>,
}

impl Logs {
    /// What there is of a log, from the stream's leader. `None` where nothing is: nobody has claimed it yet, or retention has
    /// removed all of it. A bus that is away is waited for, half a minute.
    pub async fn extent(&self, id: &BuildId) -> Result<Option<Extent>, BusError> {
        let ends = patiently(|| self.ends(id)).await?;
        Ok(ends.map(|ends| ends.extent()))
    }

    /// What is to be said of a log; `None` as with [`Logs::extent`].
    pub async fn info(&self, id: &BuildId) -> Result<Option<LogInfo>, BusError> {
        let Some(ends) = patiently(|| self.ends(id)).await? else { return Ok(None) };
        let (config, all_bytes, chunks) = patiently(async || {
            let subjects = self.stream().await?.info_with_subjects(subject::log(id)).await;
            let mut subjects = subjects.map_err(|error| BusError::unavailable(READ, error))?;
            let (config, all_bytes) = (subjects.info.config.clone(), subjects.info.state.bytes);
            let counted = subjects.try_next().await.map_err(|error| BusError::unavailable(READ, error))?;
            Ok((config, all_bytes, counted.map_or(0, |(_, chunks)| chunks as u64)))
        })
        .await?;
        Ok(Some(LogInfo {
            extent: ends.extent(),
            chunks,
            limited: ends.last.meta.limited,
            stored: ends.stored,
            max_bytes: ends.last.meta.max_bytes,
            max_age: config.max_age,
            all_bytes,
            // For NATS, -1 is no limit.
            all_max_bytes: u64::try_from(config.max_bytes).ok(),
        }))
    }

    async fn ends(&self, id: &BuildId) -> Result<Option<Ends>, BusError> {
        let (stream, subject) = (self.stream().await?, subject::log(id));
        // The last after the first: what is stored between the two makes the log longer, not shorter than its beginning.
        let first = stream.raw_message_builder().sequence(1).next_by_subject(&subject).send().await;
        let Some((first, from)) = message_of(first)? else { return Ok(None) };
        let last = stream.get_last_raw_message_by_subject(&subject).await;
        let Some((last, to)) = message_of(last)? else { return Ok(None) };
        Ok(Some(Ends { first, last, stored: (from, to) }))
    }
}

/// A log's first message and its last.
struct Ends {
    first: LogMessage,
    last: LogMessage,
    stored: (Timestamp, Timestamp),
}

impl Ends {
    fn extent(&self) -> Extent {
        let complete = self.last.meta.complete;
        Extent { first: self.first.offset(), end: self.last.meta.end, complete }
    }
}
