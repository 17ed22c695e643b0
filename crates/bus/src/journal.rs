//! The journal: every change of a build is one compare-and-set append, and the last event of a build is its state.

use std::sync::Arc;
use std::time::Duration;

use async_nats::HeaderMap;
use async_nats::jetstream::ErrorCode;
use async_nats::jetstream::context::{PublishError, PublishErrorKind};
use async_nats::jetstream::message::{PublishMessage, StreamMessage};
use async_nats::jetstream::stream::{LastRawMessageErrorKind, Stream};
use futures::StreamExt as _;
use jiff::Timestamp;
use kiln_contract::header::{self, cloudevents};
use kiln_contract::{event, subject};
use kiln_domain::id::{BuildId, ImageKey, InstanceId};
use kiln_domain::limits;
use kiln_domain::record::Record;
use kiln_domain::transition::{Change, Illegal, apply};

use crate::connection::{Bus, DISK};
use crate::error::BusError;

/// One event of a build as it lies in the journal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The whole record after the event, its times filled in.
    pub record: Record,
    /// The event's name. One of a newer release may be unknown; the record tells all the same.
    pub event: String,
    /// Its place in the stream: it grows with every change.
    pub sequence: u64,
    pub stored_at: Timestamp,
    /// `ce-id`.
    pub event_id: String,
}

/// Why an append did not happen, or may not have.
#[derive(Debug, thiserror::Error)]
pub enum AppendError {
    /// Somebody appended to this image first: read the tail and decide anew.
    #[error("another append to this image came first")]
    Lost,
    /// The event that it was to follow is in the journal no more: somebody deleted or emptied the stream.
    #[error("the journal does not hold this build's history any more")]
    Gone,
    /// The rules of `domain` don't allow it from the record that it was based on.
    #[error(transparent)]
    Illegal(#[from] Illegal),
    /// For [`BusError::Unavailable`] it is not known whether it happened.
    #[error(transparent)]
    Bus(#[from] BusError),
}

/// Bytes that are kept for each active build: twelve full records, so that each can always end.
const RESERVE: u64 = 12 * limits::RECORD_BYTES;

/// So many builds at once a journal of `limit` bytes has room for, when it holds nothing else.
pub fn room_for(limit: u64) -> u64 {
    limit / RESERVE
}

/// The journal stream, for one instance.
#[derive(Clone)]
pub struct Journal {
    bus: Bus,
    stream: Arc<Stream<()>>,
}

/// The header that names which subjects the expected sequence is of; async-nats has no constant for it.
const EXPECTED_SEQUENCE_FILTER: &str = "Nats-Expected-Last-Subject-Sequence-Subject";
const READ: &str = "read the journal";
const APPEND: &str = "append to the journal";
/// How often an append whose answer was lost is decided by reading back, before it is given up as not known.
const READ_BACKS: u32 = 5;
/// For how long an append is tried where the bus answers slowly or not at all.
const PATIENCE: Duration = Duration::from_secs(10);
/// The server itself answers within this long, or it is away.
const ANSWER: Duration = Duration::from_secs(1);

impl Journal {
    pub async fn open(bus: &Bus) -> Result<Self, BusError> {
        let stream = bus.call("open the journal", bus.js.get_stream_no_info(subject::JOURNAL_STREAM)).await?;
        Ok(Self { bus: bus.clone(), stream: Arc::new(stream) })
    }

    /// The last event of any build of an image, from the stream's leader.
    pub async fn last_of_image(&self, key: &ImageKey) -> Result<Option<Entry>, BusError> {
        self.last(&subject::image(key)).await
    }

    /// The last event of a build, from the stream's leader.
    pub async fn last_of_build(&self, id: &BuildId) -> Result<Option<Entry>, BusError> {
        self.last(&subject::build(id)).await
    }

    async fn last(&self, filter: &str) -> Result<Option<Entry>, BusError> {
        match self.bus.attend(READ, self.stream.get_last_raw_message_by_subject(filter)).await? {
            Ok(message) => entry_of(&message).map(Some),
            Err(error) if matches!(error.kind(), LastRawMessageErrorKind::NoMessageFound) => Ok(None),
            Err(error) => Err(BusError::unavailable(READ, error)),
        }
    }

    /// Why the journal takes no further build beside so many active ones, where it takes none, by its leader's word.
    pub async fn refuses(&self, active: usize) -> Result<Option<String>, BusError> {
        let info = self.bus.call(READ, self.stream.get_info()).await?;
        let limit = u64::try_from(info.config.max_bytes).ok().filter(|limit| *limit > 0);
        let limit = limit.unwrap_or(u64::MAX);
        let left = limit.saturating_sub(info.state.bytes);
        let kept = RESERVE.saturating_mul(u64::try_from(active).unwrap_or(u64::MAX).saturating_add(1));
        Ok((left < kept).then(|| {
            format!(
                "the journal is full: stream {} has {left} of {limit} bytes left, which are kept for the end of {active} active builds; \
                 raise `streams.journal_max_bytes`, or wait until its old events go",
                subject::JOURNAL_STREAM
            )
        }))
    }

    /// Has the process's keeper tell whether the journal takes a further build. One that can't be asked says nothing of it.
    pub async fn tell_room(&self, active: usize) {
        if let Ok(full) = self.refuses(active).await {
            self.bus.trouble(subject::JOURNAL_STREAM, "full", full);
        }
    }

    /// Appends a change to an image's history, on top of `tail` (its last event, `None` where it has none).
    ///
    /// Exactly one of several that append on the same tail succeeds. An answer that was lost is decided by reading
    /// back. The entry's `stored_at` is the server's.
    pub async fn append(
        &self,
        tail: Option<&Entry>,
        change: &Change,
        by: &InstanceId,
    ) -> Result<Entry, AppendError> {
        let record = apply(tail.map(|entry| &entry.record), change)?;
        let expected = tail.map_or(0, |entry| entry.sequence);
        let event = change.event();
        let event_id = format!("{}-{expected}-{event}-{:08x}", record.id, rand::random::<u32>());
        let payload = bytes::Bytes::from(
            serde_json::to_vec(&record).map_err(|error| BusError::malformed(APPEND, error))?,
        );
        let headers = headers(&record, event, &event_id, by, expected);
        let appending = async {
            let mut pause = Duration::from_millis(5);
            let mut read_backs = 0;
            loop {
                let published = self.publish(&record, event, &headers, &payload);
                let overtaken = match self.bus.attend(APPEND, published).await {
                    Ok(Ok(())) | Err(_) => false,
                    Ok(Err(error)) => match verdict(&error) {
                        Verdict::Failed(error) => return Err(error.into()),
                        Verdict::Overtaken => true,
                        Verdict::Undecided | Verdict::Unknown => false,
                    },
                };
                // Read back even a success: the server's time of the event is part of the record.
                match self.read_back(&record, event, &event_id, expected).await {
                    Ok(ReadBack::Ours(entry)) => return Ok(*entry),
                    Ok(ReadBack::Another) => return Err(AppendError::Lost),
                    Ok(ReadBack::Gone) if overtaken || read_backs >= READ_BACKS => {
                        return Err(AppendError::Gone);
                    }
                    // Nothing there: not yet decided, or never arrived. The same event is sent again.
                    Ok(ReadBack::Nothing | ReadBack::Gone) if read_backs < READ_BACKS => {}
                    Ok(ReadBack::Nothing | ReadBack::Gone) => {
                        return Err(BusError::unavailable(APPEND, "it was sent, and did not arrive").into());
                    }
                    Err(error) if read_backs >= READ_BACKS || !self.bus.is_connected() => {
                        return Err(error.into());
                    }
                    Err(_) => {}
                }
                read_backs += 1;
                tokio::time::sleep(jittered(pause)).await;
                pause = (pause * 3).min(Duration::from_secs(1));
            }
        };
        let appended = tokio::time::timeout(PATIENCE, appending)
            .await
            .unwrap_or_else(|_| Err(BusError::unavailable(APPEND, "the bus did not answer in time").into()));
        self.note_silence(&appended).await;
        appended
    }

    /// Tells where the stream takes nothing though its server answers: one that met a full disk shows it in no other way
    /// (nats-server 2.15), neither by an error nor in what it tells of the stream.
    async fn note_silence(&self, appended: &Result<Entry, AppendError>) {
        let failed = matches!(appended, Err(AppendError::Bus(BusError::Unavailable { .. })));
        if failed && self.bus.answers(ANSWER).await {
            self.bus.happened(
                subject::JOURNAL_STREAM,
                "takes_nothing",
                format!("an append was not taken, though nats-server answers: {DISK}; or most of its servers are away"),
            );
        }
    }

    async fn publish(
        &self,
        record: &Record,
        event: &str,
        headers: &HeaderMap,
        payload: &bytes::Bytes,
    ) -> Result<(), PublishError> {
        let message = PublishMessage::build().headers(headers.clone()).payload(payload.clone());
        self.bus.js.send_publish(subject::event(&record.id, event), message).await?.await?;
        Ok(())
    }

    /// What lies on top of `expected`: our event, though another may have followed it; another's; or nothing.
    async fn read_back(
        &self,
        record: &Record,
        event: &str,
        event_id: &str,
        expected: u64,
    ) -> Result<ReadBack, BusError> {
        let Some(last) = self.last_of_image(&record.image_key()).await? else {
            return Ok(if expected == 0 { ReadBack::Nothing } else { ReadBack::Gone });
        };
        if last.event_id == event_id {
            return Ok(ReadBack::Ours(Box::new(last)));
        }
        if last.sequence == expected {
            return Ok(ReadBack::Nothing);
        }
        match self.last(&subject::event(&record.id, event)).await? {
            Some(ours) if ours.event_id == event_id => Ok(ReadBack::Ours(Box::new(ours))),
            _ => Ok(ReadBack::Another),
        }
    }
}

enum ReadBack {
    Ours(Box<Entry>),
    Another,
    Nothing,
    /// Not even what it was to follow.
    Gone,
}

enum Verdict {
    /// The server says that another append came first, or it is a retry of one that arrived.
    Overtaken,
    /// The cluster can't say yet: an append to the image is in flight.
    Undecided,
    /// The answer was lost.
    Unknown,
    Failed(BusError),
}

/// What an append's error means. The codes are what nats-server 2.15 was seen to
/// answer: 10071 on one node, 10164 and 10158 on three, where they only say that an append is in flight.
fn verdict(error: &PublishError) -> Verdict {
    match error.kind() {
        PublishErrorKind::WrongLastSequence => Verdict::Overtaken,
        PublishErrorKind::TimedOut | PublishErrorKind::BrokenPipe => Verdict::Unknown,
        PublishErrorKind::StreamNotFound => Verdict::Failed(BusError::Unavailable {
            operation: APPEND,
            detail: format!("stream {} is missing or has no leader", subject::JOURNAL_STREAM),
        }),
        _ => match jetstream_code(error) {
            Some(
                ErrorCode::STREAM_WRONG_LAST_SEQUENCE_CONSTANT | ErrorCode::STREAM_DUPLICATE_MESSAGE_CONFLICT,
            ) => Verdict::Undecided,
            // maximum bytes, maximum messages, insufficient resources, storage
            Some(
                ErrorCode::STREAM_STORE_FAILED
                | ErrorCode::INSUFFICIENT_RESOURCES
                | ErrorCode::STORAGE_RESOURCES_EXCEEDED,
            ) => Verdict::Failed(BusError::Full {
                operation: APPEND,
                detail: format!("stream {}: {error}", subject::JOURNAL_STREAM),
            }),
            _ => Verdict::Failed(BusError::refused(APPEND, error)),
        },
    }
}

fn jetstream_code(error: &PublishError) -> Option<ErrorCode> {
    let source = std::error::Error::source(error)?;
    source.downcast_ref::<async_nats::jetstream::Error>().map(async_nats::jetstream::Error::error_code)
}

#[expect(clippy::disallowed_methods, reason = "ce-time is information; the stream's own time is what counts")]
fn headers(record: &Record, event: &str, event_id: &str, by: &InstanceId, expected: u64) -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert(async_nats::header::NATS_MESSAGE_ID, event_id);
    headers.insert(async_nats::header::NATS_EXPECTED_LAST_SUBJECT_SEQUENCE, expected.to_string().as_str());
    headers.insert(EXPECTED_SEQUENCE_FILTER, subject::image(&record.image_key()).as_str());
    headers.insert(cloudevents::SPEC_VERSION, "1.0");
    headers.insert(cloudevents::ID, event_id);
    headers.insert(cloudevents::TYPE, event::cloudevents_type(event).as_str());
    headers.insert(cloudevents::SOURCE, event::cloudevents_source(by.as_str()).as_str());
    headers.insert(cloudevents::TIME, Timestamp::now().to_string().as_str());
    headers.insert(cloudevents::SUBJECT, record.id.as_str());
    headers.insert(cloudevents::CONTENT_TYPE, event::CONTENT_TYPE);
    if !record.traceparent.is_empty() {
        headers.insert(header::TRACEPARENT, record.traceparent.as_str());
    }
    headers
}

/// Reads an event of the journal's stream.
pub(crate) fn entry_of(message: &StreamMessage) -> Result<Entry, BusError> {
    let stored_at = Timestamp::from_nanosecond(message.time.unix_timestamp_nanos())
        .map_err(|error| BusError::malformed(READ, error))?;
    entry(&message.subject, message.sequence, stored_at, &message.headers, &message.payload)
}

/// The records of builds that make their images from now on, as they are appended. At most once: what comes while the
/// connection is away is missed, and one may come whose append was refused. For caches, which it tells to look again.
pub async fn successes(bus: &Bus) -> Result<impl futures::Stream<Item = Record> + use<>, BusError> {
    let heard = bus.client.subscribe(subject::SUCCEEDED_SUBJECTS).await;
    let heard = heard.map_err(|error| BusError::unavailable("hear of images that are made", error))?;
    Ok(heard.filter_map(|message| async move { serde_json::from_slice(&message.payload).ok() }))
}

/// Reads an event from its parts.
pub(crate) fn entry(
    subject: &str,
    sequence: u64,
    stored_at: Timestamp,
    headers: &HeaderMap,
    payload: &[u8],
) -> Result<Entry, BusError> {
    let (id, event) = subject::parse_event(subject).map_err(|error| BusError::malformed(READ, error))?;
    let record: Record = serde_json::from_slice(payload)
        .map_err(|error| BusError::malformed(READ, format_args!("{subject} at {sequence}: {error}")))?;
    if record.id != id {
        return Err(BusError::malformed(
            READ,
            format_args!("{subject} at {sequence} holds the record of {}", record.id),
        ));
    }
    let event_id = headers.get(cloudevents::ID).map(ToString::to_string).unwrap_or_default();
    Ok(Entry { record: record.at(event, stored_at), event: event.to_owned(), sequence, stored_at, event_id })
}

/// Between half and one and a half of `pause`, so that those who lost together don't try again together.
pub(crate) fn jittered(pause: Duration) -> Duration {
    pause.mul_f64(0.5 + rand::random::<f64>())
}
