//! Reading a log: replayed from the stream, then live, without gap or repeat.

use std::collections::VecDeque;
use std::time::Duration;

use bytes::Bytes;
use futures::Stream;
use kiln_domain::id::BuildId;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::live::{Follower, Heard};
use super::message::LogMessage;
use super::{LogError, LogTail, Logs, patiently};

/// A piece of a log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Of its first byte.
    pub offset: u64,
    /// Empty only where `complete` says that nothing follows.
    pub bytes: Bytes,
    pub complete: bool,
}

/// Where a read begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// At the first byte that is kept.
    Beginning,
    /// At this byte, which must be there, or be the next one.
    Offset(u64),
    /// So many bytes before the present end.
    Tail(u64),
}

/// Where a read ends.
#[derive(Clone, Debug)]
pub enum Until {
    /// At what the stream's leader holds when the read begins.
    Now,
    /// At the log's own end, which is waited for. `over` tells that the build is over, so that the end is near.
    Complete { over: CancellationToken },
}

/// A build is over and there is no log at all: so often it is asked whether one is still to come.
const NO_LOG: Duration = Duration::from_secs(3);

impl Logs {
    /// Reads a build's log from `start` until `until`. Nothing is read ahead by more than a batch: who takes slowly slows
    /// nobody else.
    ///
    /// A log that is not begun yet is waited for by [`Until::Complete`] (whether the build exists is the caller's to
    /// know; of one that is over, as long as it isn't cleaned up) and [`LogError::NotFound`] for [`Until::Now`]. An offset that retention has discarded is
    /// [`LogError::Discarded`], also one that it discards while this reads. A bus that is away is waited for, half a minute.
    pub fn read(
        &self,
        id: &BuildId,
        start: Start,
        until: Until,
    ) -> impl Stream<Item = Result<Chunk, LogError>> + Send + use<> {
        let reader = Reader {
            logs: self.clone(),
            id: id.clone(),
            until,
            at: At::Unbegun(start),
            follower: None,
            fetched: VecDeque::new(),
            seen: 0,
            target: 0,
            offset: None,
            told_over: false,
            give_up: None,
        };
        futures::stream::unfold(reader, |mut reader| async move {
            let item = match reader.next().await {
                Ok(chunk) => Ok(chunk?),
                Err(error) => {
                    reader.at = At::End;
                    Err(error)
                }
            };
            Some((item, reader))
        })
    }
}

enum At {
    Unbegun(Start),
    Within,
    End,
}

struct Reader {
    logs: Logs,
    id: BuildId,
    until: Until,
    at: At,
    /// Of a read that follows, since before the replay began.
    follower: Option<Follower>,
    fetched: VecDeque<LogMessage>,
    /// The sequence of the last message that was taken, or the one before the first that shall be.
    seen: u64,
    /// There are messages up to this sequence.
    target: u64,
    /// Of the next byte to give; `None` before the first message where any offset will do.
    offset: Option<u64>,
    told_over: bool,
    give_up: Option<Instant>,
}

impl Reader {
    async fn next(&mut self) -> Result<Option<Chunk>, LogError> {
        loop {
            match self.at {
                At::Unbegun(start) => {
                    self.begin(start).await?;
                    self.at = At::Within;
                }
                At::End => return Ok(None),
                At::Within => {}
            }
            if let Some(message) = self.fetched.pop_front() {
                if let Some(chunk) = self.take(&message)? {
                    return Ok(Some(chunk));
                }
            } else if self.seen < self.target {
                self.replay().await?;
            } else if let Until::Complete { over } = &self.until {
                let over = over.clone();
                self.wait(&over).await?;
            } else {
                self.at = At::End;
            }
        }
    }

    /// Finds the first message. The subscription comes first, so that nothing falls between replay and live.
    async fn begin(&mut self, start: Start) -> Result<(), LogError> {
        if matches!(self.until, Until::Complete { .. }) {
            self.follower = Some(patiently(|| self.logs.follow(&self.id)).await?);
        }
        let Some(tail) = patiently(|| self.logs.tail(&self.id)).await? else {
            return match (&self.until, start) {
                (Until::Now, _) => Err(LogError::NotFound { id: self.id.clone() }),
                (_, Start::Offset(wanted @ 1..)) => {
                    Err(LogError::Beyond { id: self.id.clone(), wanted, end: 0 })
                }
                _ => Ok(()),
            };
        };
        self.target = tail.sequence;
        let offset = match start {
            Start::Beginning => return Ok(()),
            Start::Offset(wanted) if wanted > tail.end => {
                return Err(LogError::Beyond { id: self.id.clone(), wanted, end: tail.end });
            }
            Start::Offset(offset) => offset,
            Start::Tail(bytes) => {
                let first = self.logs.first_offset(&self.id).await?;
                tail.end.saturating_sub(bytes).max(first)
            }
        };
        self.seen = self.logs.seek(&self.id, offset, &tail).await? - 1;
        self.offset = Some(offset);
        Ok(())
    }

    /// Fetches what follows `seen`.
    async fn replay(&mut self) -> Result<(), LogError> {
        let fetched = self.logs.replay(&self.id, self.seen + 1).await?;
        if fetched.is_empty() {
            // Retention was quicker.
            self.seen = self.target;
        }
        self.fetched = fetched.iter().cloned().collect();
        Ok(())
    }

    async fn wait(&mut self, over: &CancellationToken) -> Result<(), LogError> {
        let Some(follower) = &mut self.follower else {
            self.at = At::End;
            return Ok(());
        };
        let give_up = self.give_up.filter(|_| self.seen == 0);
        let too_late = async {
            match give_up {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            heard = follower.hear() => match heard? {
                Heard::Chunk(message) if self.is_anew(&message.meta) => self.begin_anew(message.sequence),
                Heard::Tail(tail) if self.is_anew(&tail) => self.begin_anew(tail.sequence),
                Heard::Tail(tail) => self.target = self.target.max(tail.sequence),
                Heard::Chunk(message) if message.sequence <= self.seen => {}
                Heard::Chunk(message) if message.previous > self.seen => self.target = self.target.max(message.sequence),
                Heard::Chunk(message) => self.fetched.push_back(message),
                Heard::Behind(sequence) => self.target = self.target.max(sequence),
            },
            () = over.cancelled(), if !self.told_over => {
                self.told_over = true;
                self.give_up = Some(Instant::now() + NO_LOG);
                follower.check();
            }
            () = too_late => {
                // As long as nobody has cleaned up after the build, its log is to be completed, be the bus as slow as it may.
                if !patiently(|| self.logs.is_to_come(&self.id)).await? {
                    return Err(LogError::NotFound { id: self.id.clone() });
                }
                self.give_up = Some(Instant::now() + NO_LOG);
                follower.check();
            }
        }
        Ok(())
    }

    /// Whether a message that stands where the reader has been says what it doesn't know: then the stream was deleted or
    /// emptied, and its sequences have begun anew.
    fn is_anew(&self, message: &LogTail) -> bool {
        message.sequence <= self.seen
            && self.offset.is_some_and(|offset| message.end > offset || message.complete)
    }

    /// Reads what is there now, up to a sequence. The offset stays: a log goes on where it was.
    fn begin_anew(&mut self, target: u64) {
        self.logs.forget_batches();
        self.seen = 0;
        self.target = target;
        self.fetched.clear();
    }

    /// What of a message is new to the caller.
    fn take(&mut self, message: &LogMessage) -> Result<Option<Chunk>, LogError> {
        if message.sequence <= self.seen {
            return Ok(None);
        }
        self.seen = message.sequence;
        if matches!(self.until, Until::Now) && message.sequence > self.target {
            self.at = At::End;
            return Ok(None);
        }
        let offset = self.offset.unwrap_or(message.offset());
        if message.offset() > offset {
            return Err(LogError::Discarded { id: self.id.clone(), wanted: offset, first: message.offset() });
        }
        let known = usize::try_from(offset - message.offset()).unwrap_or(usize::MAX).min(message.bytes.len());
        let bytes = message.bytes.slice(known..);
        self.offset = Some(offset + bytes.len() as u64);
        let complete = message.meta.complete;
        if complete {
            self.at = At::End;
        }
        // A claim has no bytes.
        Ok((complete || !bytes.is_empty()).then_some(Chunk { offset, bytes, complete }))
    }
}
