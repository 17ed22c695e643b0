//! A message of the log stream: its headers read and written, and batches of them fetched from any replica.

use std::sync::Arc;
use std::time::Duration;

use async_nats::HeaderMap;
use bytes::Bytes;
use futures::StreamExt as _;
use kiln_contract::{header, subject};
use kiln_domain::engine::Cursor;
use kiln_domain::id::BuildId;
use serde::Serialize;

use super::{LogTail, Logs, READ, Source};
use crate::error::BusError;

/// A chunk with its place in the stream.
#[derive(Clone, Debug)]
pub(super) struct LogMessage {
    pub(super) sequence: u64,
    /// The sequence of the message before it of the same log; only a live one says it.
    pub(super) previous: u64,
    pub(super) meta: Arc<LogTail>,
    pub(super) bytes: Bytes,
}

/// Set by the server on what it republishes or gives by direct get.
const SEQUENCE: &str = "Nats-Sequence";
/// On a republished message: the subject's sequence before it.
const LAST_SEQUENCE: &str = "Nats-Last-Sequence";
/// JetStream's batch direct get (ADR-31), which async-nats has no call for.
const DIRECT_GET: &str = "$JS.API.DIRECT.GET";
/// Bytes at which a batch ends: what a reader that takes slowly holds.
pub(super) const BATCH_BYTES: usize = 512 * 1024;
/// A replica answers each message of a batch within this long.
const ANSWER: Duration = Duration::from_secs(5);

impl LogMessage {
    /// A message as it lies in the stream.
    pub(super) fn stored(sequence: u64, headers: &HeaderMap, bytes: Bytes) -> Result<Self, BusError> {
        let wrong = |what| {
            BusError::malformed(READ, format_args!("message {sequence} of the stream has no valid `{what}`"))
        };
        let text = |name| headers.get(name).map(async_nats::HeaderValue::as_str);
        let number = |name| text(name).and_then(|text| text.parse::<u64>().ok());
        let offset = number(header::LOG_OFFSET).ok_or_else(|| wrong(header::LOG_OFFSET))?;
        let writer = text(header::LOG_WRITER)
            .and_then(|text| text.parse().ok())
            .ok_or_else(|| wrong(header::LOG_WRITER))?;
        let source = text(header::LOG_SOURCE_CURSOR)
            .and_then(Source::parse)
            .ok_or_else(|| wrong(header::LOG_SOURCE_CURSOR))?;
        let complete = text(header::LOG_COMPLETE) == Some("true");
        let limited = text(header::LOG_LIMITED) == Some("true");
        let max_bytes = number(header::LOG_MAX_BYTES);
        let end = offset + bytes.len() as u64;
        Ok(Self {
            sequence,
            previous: 0,
            meta: Arc::new(LogTail { sequence, end, writer, source, complete, limited, max_bytes }),
            bytes,
        })
    }

    /// A message as the server sends it outside of an API answer.
    pub(super) fn sent(message: async_nats::Message) -> Result<Self, BusError> {
        let headers = message.headers.unwrap_or_default();
        let number = |name| headers.get(name).and_then(|text| text.as_str().parse::<u64>().ok());
        let sequence =
            number(SEQUENCE).ok_or_else(|| BusError::malformed(READ, "a message without its sequence"))?;
        let previous = number(LAST_SEQUENCE).unwrap_or(0);
        Ok(Self { previous, ..Self::stored(sequence, &headers, message.payload)? })
    }

    /// The offset of its first byte.
    pub(super) fn offset(&self) -> u64 {
        self.meta.end - self.bytes.len() as u64
    }

    pub(super) fn tail(&self) -> LogTail {
        LogTail::clone(&self.meta)
    }
}

impl Source {
    /// The first byte of the first attempt.
    pub fn beginning() -> Self {
        Self { attempt: 1, cursor: Cursor::default() }
    }

    fn parse(text: &str) -> Option<Self> {
        // The client trims a header: of an empty cursor only the attempt is left.
        let (attempt, cursor) = text.split_once(' ').unwrap_or((text, ""));
        Some(Self { attempt: attempt.parse().ok()?, cursor: Cursor::new(cursor) })
    }

    /// As a header; `None` where the engine's cursor can't be in one.
    pub(super) fn to_header(&self) -> Option<String> {
        let cursor = self.cursor.as_str();
        let fits = cursor.chars().all(|c| c == ' ' || c.is_ascii_graphic()) && cursor.trim() == cursor;
        fits.then(|| format!("{} {cursor}", self.attempt))
    }
}

#[derive(Serialize)]
struct BatchRequest<'a> {
    seq: u64,
    batch: usize,
    max_bytes: usize,
    next_by_subj: &'a str,
}

impl Logs {
    /// Up to `batch` messages of a log ([`BATCH_BYTES`] and one more at most), from sequence `from` on, from any replica: on a cluster the
    /// last ones may not be there yet.
    pub(super) async fn fetch(
        &self,
        id: &BuildId,
        from: u64,
        batch: usize,
    ) -> Result<Vec<LogMessage>, BusError> {
        let _turn =
            self.shared.replays.acquire().await.map_err(|error| BusError::unavailable(READ, error))?;
        let subject = subject::log(id);
        let request = BatchRequest { seq: from, batch, max_bytes: BATCH_BYTES, next_by_subj: &subject };
        let request = serde_json::to_vec(&request).map_err(|error| BusError::malformed(READ, error))?;
        self.shared.bus.attend(READ, self.batch(request.into())).await?
    }

    async fn batch(&self, request: Bytes) -> Result<Vec<LogMessage>, BusError> {
        let client = &self.shared.bus.client;
        let inbox = client.new_inbox();
        let mut answers =
            client.subscribe(inbox.clone()).await.map_err(|error| BusError::unavailable(READ, error))?;
        client
            .publish_with_reply(format!("{DIRECT_GET}.{}", subject::LOGS_STREAM), inbox, request)
            .await
            .map_err(|error| BusError::unavailable(READ, error))?;
        let mut messages = Vec::new();
        loop {
            let answer = tokio::time::timeout(ANSWER, answers.next())
                .await
                .map_err(|_| BusError::unavailable(READ, "no replica answered in time"))?
                .ok_or_else(|| BusError::unavailable(READ, "the connection is closed"))?;
            match answer.status.map(|status| status.as_u16()) {
                None => messages.push(LogMessage::sent(answer)?),
                // The batch ends; or there is nothing at all.
                Some(204 | 404) => return Ok(messages),
                Some(503) => {
                    return Err(BusError::unavailable(READ, "the stream is missing or has no replica"));
                }
                Some(status) => {
                    let told = answer.description.unwrap_or_default();
                    return Err(BusError::refused(READ, format_args!("direct get: {status} {told}")));
                }
            }
        }
    }
}
