//! The log stream: one masked byte stream for each build, appended to by one fenced writer, read from any offset.
//!
//! A byte offset means the same place live, replayed and resumed, in every process. What decides (the tail that a writer
//! appends on, where a read ends) comes from the stream's leader; the bytes themselves from any replica.

mod append;
mod info;
mod live;
mod message;
mod progress;
mod read;
mod replay;
mod seek;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use async_nats::jetstream::stream::{LastRawMessageErrorKind, RawMessageError, Stream};
use jiff::Timestamp;
use kiln_contract::error::{Code, Refusal};
use kiln_contract::subject;
use kiln_domain::engine::Cursor;
use kiln_domain::id::{BuildId, InstanceId};
use tokio::sync::Semaphore;
use tokio_util::task::TaskTracker;

pub use self::append::{AppendError, LogWriter};
pub use self::info::{Extent, LogInfo};
pub use self::read::{Chunk, Start, Until};

use self::live::Live;
use self::message::LogMessage;
use self::replay::Batches;
use crate::connection::Bus;
use crate::error::BusError;
use crate::journal::jittered;
use crate::secrets::SecretsBucket;

/// Bytes of a chunk. A relay's own line may come on top.
pub const CHUNK_BYTES: usize = 64 * 1024;

/// Replays from the stream at once, in one process; more wait.
const REPLAYS: usize = 32;
/// A read that can't reach the bus goes on trying for this long.
const PATIENCE: Duration = Duration::from_secs(30);
const READ: &str = "read a log";

/// The logs of all builds; clones share subscriptions.
#[derive(Clone)]
pub struct Logs {
    shared: Arc<Shared>,
}

struct Shared {
    bus: Bus,
    live: Mutex<HashMap<BuildId, Weak<Live>>>,
    replays: Semaphore,
    batches: Batches,
    tasks: TaskTracker,
}

/// How far a writer has got with its source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// From 1.
    pub attempt: u32,
    /// Of the first raw byte whose masked form isn't stored yet.
    pub cursor: Cursor,
}

/// What the last message of a log says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogTail {
    /// The message's place in the stream.
    pub sequence: u64,
    /// The log's length: the offset of the byte that would follow.
    pub end: u64,
    /// Who wrote it, and so who may write next, unless another has claimed the log.
    pub writer: InstanceId,
    pub source: Source,
    /// Nothing follows.
    pub complete: bool,
    /// The builder wrote more than the log may hold.
    pub limited: bool,
    /// The size limit that its writer keeps to; only a claim doesn't say it, and a writer of an old release.
    pub max_bytes: Option<u64>,
}

/// Why a log can't be read.
#[derive(Debug, Clone, thiserror::Error)]
pub enum LogError {
    /// What was asked for is gone: retention has removed it, or the stream was deleted or emptied.
    #[error("the log of `{id}` begins at byte {first} now: byte {wanted} is kept no more")]
    Discarded { id: BuildId, wanted: u64, first: u64 },
    #[error("the log of `{id}` ends at byte {end}: there is no byte {wanted}")]
    Beyond { id: BuildId, wanted: u64, end: u64 },
    #[error("there is no log of `{id}`: nothing was written, or it is kept no more")]
    NotFound { id: BuildId },
    #[error(transparent)]
    Bus(#[from] BusError),
}

impl From<LogError> for Refusal {
    fn from(error: LogError) -> Self {
        match error {
            LogError::Discarded { .. } | LogError::Beyond { .. } => {
                Self::new(Code::OutOfRange, error.to_string())
            }
            LogError::NotFound { .. } => Self::new(Code::NotFound, error.to_string()),
            LogError::Bus(error) => error.into(),
        }
    }
}

impl Logs {
    pub fn new(bus: &Bus) -> Self {
        Self {
            shared: Arc::new(Shared {
                bus: bus.clone(),
                live: Mutex::default(),
                replays: Semaphore::new(REPLAYS),
                batches: replay::batches(),
                tasks: TaskTracker::new(),
            }),
        }
    }

    /// What the last message of a build's log says, from the stream's leader. `None` where there is none: nobody has
    /// claimed it yet, or retention has removed it.
    pub async fn tail(&self, id: &BuildId) -> Result<Option<LogTail>, BusError> {
        let (stream, subject) = (self.stream().await?, subject::log(id));
        let found = self.shared.bus.attend(READ, stream.get_last_raw_message_by_subject(&subject)).await?;
        Ok(message_of(found)?.map(|(message, _)| message.tail()))
    }

    /// Whether the build isn't cleaned up yet: before that its log is completed, so it is there or to come.
    async fn is_to_come(&self, id: &BuildId) -> Result<bool, BusError> {
        SecretsBucket::open(&self.shared.bus).await?.lists(id).await
    }

    /// The first message at or after a sequence, from the stream's leader.
    async fn next_from_leader(&self, id: &BuildId, sequence: u64) -> Result<Option<LogMessage>, BusError> {
        let stream = self.stream().await?;
        let asked = stream.raw_message_builder().sequence(sequence).next_by_subject(subject::log(id));
        Ok(message_of(self.shared.bus.attend(READ, asked.send()).await?)?.map(|(message, _)| message))
    }

    async fn stream(&self) -> Result<Stream<()>, BusError> {
        let stream = self.shared.bus.js.get_stream_no_info(subject::LOGS_STREAM).await;
        stream.map_err(|error| BusError::unavailable(READ, error))
    }
}

/// A message that was asked for, and when it was stored.
fn message_of(
    found: Result<async_nats::jetstream::message::StreamMessage, RawMessageError>,
) -> Result<Option<(LogMessage, Timestamp)>, BusError> {
    match found {
        Ok(found) => {
            let stored_at = Timestamp::from_nanosecond(found.time.unix_timestamp_nanos())
                .map_err(|error| BusError::malformed(READ, error))?;
            let message = LogMessage::stored(found.sequence, &found.headers, found.payload)?;
            Ok(Some((message, stored_at)))
        }
        Err(error) if matches!(error.kind(), LastRawMessageErrorKind::NoMessageFound) => Ok(None),
        Err(error) => Err(BusError::unavailable(READ, error)),
    }
}

/// Repeats a read while the bus is away, for [`PATIENCE`].
async fn patiently<T, F, R>(mut read: F) -> Result<T, BusError>
where
    F: FnMut() -> R,
    R: Future<Output = Result<T, BusError>>,
{
    let give_up = tokio::time::Instant::now() + PATIENCE;
    let mut pause = Duration::from_millis(20);
    loop {
        match read().await {
            Err(BusError::Unavailable { .. }) if tokio::time::Instant::now() < give_up => {
                tokio::time::sleep(jittered(pause)).await;
                pause = (pause * 2).min(Duration::from_secs(1));
            }
            decided => return decided,
        }
    }
}
