//! Writing a log: one writer, one append in flight, each fenced by the sequence of the message before it.

use std::time::Duration;

use async_nats::HeaderMap;
use async_nats::jetstream::ErrorCode;
use async_nats::jetstream::context::{PublishError, PublishErrorKind};
use async_nats::jetstream::message::PublishMessage;
use bytes::Bytes;
use kiln_contract::{header, subject};
use kiln_domain::id::{BuildId, InstanceId};

use super::{LogTail, Logs, Source};
use crate::error::BusError;
use crate::journal::jittered;

/// Why an append did not happen.
#[derive(Debug, thiserror::Error)]
pub enum AppendError {
    /// Another has claimed the log, or has completed it: this writer's time is over.
    #[error("another writer has the log of `{id}` now")]
    Replaced { id: BuildId },
    /// The stream holds nothing of this log any more: somebody deleted or emptied it, or its age took all. Nothing was appended.
    /// The writer stands, and goes on at its offset with the next append, which may say so in the log.
    #[error("what was stored of the log of `{id}` is gone, up to byte {end}")]
    Emptied { id: BuildId, end: u64 },
    #[error(transparent)]
    Bus(#[from] BusError),
}

/// The one who may append to a log, until another has claimed it.
pub struct LogWriter {
    logs: Logs,
    id: BuildId,
    writer: InstanceId,
    /// Of the log's last message; 0 before the first.
    sequence: u64,
    end: u64,
    source: Source,
    limited: bool,
    max_bytes: Option<u64>,
}

const APPEND: &str = "append to a log";

impl Logs {
    /// Claims a log for `me` on top of its tail as it was read: an empty chunk. Of several who try on the same tail one
    /// succeeds, the others are [`AppendError::Replaced`]. It waits for a bus that is away.
    pub async fn claim(
        &self,
        id: &BuildId,
        me: &InstanceId,
        tail: Option<&LogTail>,
    ) -> Result<LogWriter, AppendError> {
        let mut writer = LogWriter {
            logs: self.clone(),
            id: id.clone(),
            writer: me.clone(),
            sequence: tail.map_or(0, |tail| tail.sequence),
            end: tail.map_or(0, |tail| tail.end),
            source: tail.map_or_else(Source::beginning, |tail| tail.source.clone()),
            limited: tail.is_some_and(|tail| tail.limited),
            max_bytes: None,
        };
        let source = writer.source.clone();
        writer.append(Bytes::new(), source, false).await?;
        Ok(writer)
    }
}

impl LogWriter {
    /// The log's length.
    pub fn end(&self) -> u64 {
        self.end
    }

    /// How far the source is stored.
    pub fn source(&self) -> &Source {
        &self.source
    }

    /// From the next append on the log says that it has reached its size limit.
    pub fn mark_limited(&mut self) {
        self.limited = true;
    }

    /// From the next append on the log says what its size limit is. The writer's caller keeps to it.
    pub fn keeps_to(&mut self, max_bytes: u64) {
        self.max_bytes = Some(max_bytes);
    }

    /// Appends a chunk whose bytes are masked; `source` is how far the log has got with it.
    ///
    /// It returns once it knows: a bus that is away is waited for, an answer that was lost is decided by reading the last
    /// message back. Dropped half-way, the writer must be dropped with it, and the log claimed anew.
    pub async fn append(&mut self, bytes: Bytes, source: Source, complete: bool) -> Result<(), AppendError> {
        let headers = self.headers(&source, complete)?;
        let mut pause = Duration::from_millis(5);
        loop {
            let message = PublishMessage::build()
                .headers(headers.clone())
                .payload(bytes.clone())
                .expected_last_subject_sequence(self.sequence);
            match self.logs.shared.bus.attend(APPEND, self.publish(message)).await {
                Ok(Ok(sequence)) => {
                    self.advance(sequence, bytes.len(), source);
                    return Ok(());
                }
                Ok(Err(error)) => refused(&error)?,
                Err(_away) => {}
            }
            match self.logs.tail(&self.id).await {
                Ok(Some(tail)) if self.is_ours(&tail, bytes.len(), &source, complete) => {
                    self.advance(tail.sequence, bytes.len(), source);
                    return Ok(());
                }
                // Not there yet, or never to come: the same is sent again, and one of the two is stored.
                Ok(Some(tail)) if tail.sequence == self.sequence => {}
                Ok(Some(_)) => return Err(AppendError::Replaced { id: self.id.clone() }),
                Ok(None) if self.sequence > 0 => {
                    self.sequence = 0;
                    return Err(AppendError::Emptied { id: self.id.clone(), end: self.end });
                }
                Ok(None) => {}
                Err(BusError::Unavailable { .. }) => {}
                Err(error) => return Err(error.into()),
            }
            tokio::time::sleep(jittered(pause)).await;
            pause = (pause * 2).min(Duration::from_secs(1));
        }
    }

    async fn publish(&self, message: PublishMessage) -> Result<u64, PublishError> {
        let ack = self.logs.shared.bus.js.send_publish(subject::log(&self.id), message).await?.await?;
        Ok(ack.sequence)
    }

    /// Whether the log's last message is the one that is being appended.
    fn is_ours(&self, tail: &LogTail, length: usize, source: &Source, complete: bool) -> bool {
        tail.sequence > self.sequence
            && tail.writer == self.writer
            && tail.source == *source
            && tail.end == self.end + length as u64
            && tail.complete == complete
    }

    fn advance(&mut self, sequence: u64, length: usize, source: Source) {
        self.sequence = sequence;
        self.end += length as u64;
        self.source = source;
    }

    fn headers(&self, source: &Source, complete: bool) -> Result<HeaderMap, BusError> {
        let cursor = source.to_header().ok_or_else(|| {
            BusError::malformed(
                APPEND,
                format_args!("the engine's cursor {:?} can't be a header", source.cursor.as_str()),
            )
        })?;
        let mut headers = HeaderMap::new();
        headers.insert(header::LOG_WRITER, self.writer.as_str());
        headers.insert(header::LOG_OFFSET, self.end.to_string().as_str());
        headers.insert(header::LOG_SOURCE_CURSOR, cursor.as_str());
        if complete {
            headers.insert(header::LOG_COMPLETE, "true");
        }
        if self.limited {
            headers.insert(header::LOG_LIMITED, "true");
        }
        if let Some(max_bytes) = self.max_bytes {
            headers.insert(header::LOG_MAX_BYTES, max_bytes.to_string().as_str());
        }
        Ok(headers)
    }
}

/// An error that trying again won't mend. All others are decided by reading back: 10071 on one node says that another
/// append came first or that ours had arrived, 10164 and 10158 on a cluster only that one is in flight.
fn refused(error: &PublishError) -> Result<(), BusError> {
    match error.kind() {
        PublishErrorKind::MaxPayloadExceeded => Err(BusError::refused(APPEND, error)),
        PublishErrorKind::Other => {
            let code = std::error::Error::source(error)
                .and_then(|source| source.downcast_ref::<async_nats::jetstream::Error>())
                .map(async_nats::jetstream::Error::error_code);
            match code {
                Some(ErrorCode::STREAM_MESSAGE_EXCEEDS_MAXIMUM) => Err(BusError::refused(APPEND, error)),
                _ => Ok(()),
            }
        }
        _ => Ok(()),
    }
}
