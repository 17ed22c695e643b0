//! Streams that outlive a connection: a log and a build's record, asked for again from where they broke off.
//!
//! Tries are bounded: they count from the last news, so that a gateway which accepts and breaks for ever is
//! given up, and a long build behind a gateway that is now and then restarted is not.

use std::pin::Pin;
use std::time::Duration;

use backon::{BackoffBuilder as _, ExponentialBackoff, ExponentialBuilder};
use futures::stream::{self, Stream};
use kiln_proto::kiln_v1::build_logs_request::Start as ApiStart;
use kiln_proto::kiln_v1::{Build, BuildLogsRequest, BuildState, LogChunk, WatchBuildRequest};
use tokio::time::Instant;
use tonic::Streaming;

use super::connection::{Gateway, answer};
use super::failure::Failure;

const READING: &str = "reading the log";
const WATCHING: &str = "watching the build";
/// With the delays below a gateway may be away for about half a minute, for who follows.
const TRIES: usize = 10;
/// Who wants what there is now doesn't wait for what may come: some five seconds.
const TRIES_NOW: usize = 5;
const FIRST_DELAY: Duration = Duration::from_millis(100);
const LONGEST_DELAY: Duration = Duration::from_secs(5);
/// A stream that held so long was a good one: tries begin anew.
const HELD: Duration = Duration::from_secs(30);

/// Where to begin a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Start {
    /// The first byte that is kept.
    Beginning,
    Offset(u64),
    /// So many of the newest bytes.
    Tail(u64),
}

/// A part of a log, each byte of which comes once and in order.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Piece {
    /// Of the content's first byte.
    pub(super) offset: u64,
    pub(super) content: Vec<u8>,
    /// There is nothing after it.
    pub(super) complete: bool,
}

/// What a stream yields.
#[derive(Debug)]
pub(super) enum Item<T> {
    New(T),
    /// It broke off so; after a pause it will be asked for again.
    Broken(Failure),
}

/// A stream that may be polled in a `select!`: dropping a poll loses nothing.
pub(super) type Resumed<T> = Pin<Box<dyn Stream<Item = Result<Item<T>, Failure>> + Send>>;

/// A build's log; with `follow` until it is complete. An error ends the stream.
pub(super) fn log(gateway: &Gateway, id: &str, start: Start, follow: bool) -> Resumed<Piece> {
    let reader = LogReader {
        gateway: gateway.clone(),
        id: id.to_owned(),
        start,
        follow,
        cursor: Cursor { next: None },
        open: None,
        patience: Patience::new(if follow { TRIES } else { TRIES_NOW }),
        ended: false,
    };
    Box::pin(stream::unfold(
        reader,
        |mut reader| async move { reader.next().await.map(|item| (item, reader)) },
    ))
}

/// A build's record, now and after each change, until the terminal one. An error ends the stream.
pub(super) fn watch(gateway: &Gateway, id: &str) -> Resumed<Build> {
    let watcher = Watcher {
        gateway: gateway.clone(),
        id: id.to_owned(),
        revision: 0,
        open: None,
        patience: Patience::new(TRIES),
        ended: false,
    };
    Box::pin(stream::unfold(watcher, |mut watcher| async move {
        watcher.next().await.map(|item| (item, watcher))
    }))
}

/// Whether a build is over.
pub(super) fn is_terminal(build: &Build) -> bool {
    matches!(build.state(), BuildState::Succeeded | BuildState::Failed | BuildState::Cancelled)
}

struct LogReader {
    gateway: Gateway,
    id: String,
    start: Start,
    follow: bool,
    cursor: Cursor,
    open: Option<Streaming<LogChunk>>,
    patience: Patience,
    ended: bool,
}

impl LogReader {
    async fn next(&mut self) -> Option<Result<Item<Piece>, Failure>> {
        while !self.ended {
            match self.chunk().await {
                Ok(Some(piece)) => {
                    self.ended = piece.complete;
                    if !piece.content.is_empty() {
                        self.patience.renew();
                    }
                    if !piece.content.is_empty() || piece.complete {
                        return Some(Ok(Item::New(piece)));
                    }
                }
                // Without `follow` that is the end of what is there.
                Ok(None) if !self.follow => self.ended = true,
                Ok(None) => return Some(self.broken(Failure::StreamEnded { doing: READING })),
                Err(failure) => return Some(self.broken(failure)),
            }
        }
        None
    }

    async fn chunk(&mut self) -> Result<Option<Piece>, Failure> {
        if self.open.is_none() {
            self.patience.pause().await;
            let request = BuildLogsRequest {
                id: self.id.clone(),
                follow: self.follow,
                start: self.cursor.place(self.start),
            };
            let opened = answer(READING, self.gateway.builds().build_logs(request)).await?;
            self.patience.opened();
            self.open = Some(opened);
        }
        let Some(open) = &mut self.open else { return Ok(None) };
        let chunk = open.message().await.map_err(|status| Failure::rpc(READING, status))?;
        chunk.map(|chunk| self.cursor.take(chunk)).transpose()
    }

    fn broken(&mut self, failure: Failure) -> Result<Item<Piece>, Failure> {
        self.open = None;
        let verdict = self.patience.broken(failure);
        self.ended = verdict.is_err();
        verdict.map(Item::Broken)
    }
}

struct Watcher {
    gateway: Gateway,
    id: String,
    /// The newest record's, which is never 0.
    revision: u64,
    open: Option<Streaming<Build>>,
    patience: Patience,
    ended: bool,
}

impl Watcher {
    async fn next(&mut self) -> Option<Result<Item<Build>, Failure>> {
        while !self.ended {
            match self.record().await {
                // Another replica's view may be behind; equal is news too, as a step is no change of the record.
                Ok(Some(build)) if build.revision < self.revision => {}
                Ok(Some(build)) => {
                    if build.revision > self.revision {
                        self.patience.renew();
                    }
                    self.revision = build.revision;
                    self.ended = is_terminal(&build);
                    return Some(Ok(Item::New(build)));
                }
                Ok(None) => return Some(self.broken(Failure::StreamEnded { doing: WATCHING })),
                Err(failure) => return Some(self.broken(failure)),
            }
        }
        None
    }

    async fn record(&mut self) -> Result<Option<Build>, Failure> {
        if self.open.is_none() {
            self.patience.pause().await;
            let request = WatchBuildRequest { id: self.id.clone() };
            let opened = answer(WATCHING, self.gateway.builds().watch_build(request)).await?;
            self.patience.opened();
            self.open = Some(opened);
        }
        let Some(open) = &mut self.open else { return Ok(None) };
        open.message().await.map_err(|status| Failure::rpc(WATCHING, status))
    }

    fn broken(&mut self, failure: Failure) -> Result<Item<Build>, Failure> {
        self.open = None;
        let verdict = self.patience.broken(failure);
        self.ended = verdict.is_err();
        verdict.map(Item::Broken)
    }
}

/// The place in a log that was reached.
struct Cursor {
    /// The next byte's offset, once one is known.
    next: Option<u64>,
}

impl Cursor {
    /// What to ask for: the next byte, or at first what the user asked for.
    fn place(&self, asked: Start) -> Option<ApiStart> {
        match (self.next, asked) {
            (Some(next), _) => Some(ApiStart::Offset(next)),
            (None, Start::Beginning) => None,
            (None, Start::Offset(offset)) => Some(ApiStart::Offset(offset)),
            (None, Start::Tail(bytes)) => Some(ApiStart::TailBytes(bytes)),
        }
    }

    /// What is new in a chunk. A chunk that begins past the next byte is [`Failure::Gap`].
    fn take(&mut self, chunk: LogChunk) -> Result<Piece, Failure> {
        let next = self.next.unwrap_or(chunk.offset);
        let Some(seen) = next.checked_sub(chunk.offset) else {
            return Err(Failure::Gap { doing: READING, expected: next, got: chunk.offset });
        };
        let mut content = chunk.content;
        let seen = usize::try_from(seen).unwrap_or(usize::MAX).min(content.len());
        content.drain(..seen);
        self.next = Some(next + content.len() as u64);
        Ok(Piece { offset: next, content, complete: chunk.complete })
    }
}

/// How often, and how soon, a broken stream is asked for again.
struct Patience {
    tries: usize,
    delays: ExponentialBackoff,
    pause: Option<Duration>,
    opened: Option<Instant>,
}

impl Patience {
    fn new(tries: usize) -> Self {
        Self { tries, delays: delays(tries), pause: None, opened: None }
    }

    /// There was news.
    fn renew(&mut self) {
        self.delays = delays(self.tries);
    }

    fn opened(&mut self) {
        self.opened = Some(Instant::now());
    }

    /// Whether to try again after this: then the failure is given back as a notice.
    fn broken(&mut self, failure: Failure) -> Result<Failure, Failure> {
        if !failure.may_pass() {
            return Err(failure);
        }
        if self.opened.take().is_some_and(|opened| opened.elapsed() >= HELD) {
            self.renew();
        }
        self.pause = self.delays.next();
        if self.pause.is_some() { Ok(failure) } else { Err(failure) }
    }

    async fn pause(&mut self) {
        if let Some(pause) = self.pause.take() {
            tokio::time::sleep(pause).await;
        }
    }
}

fn delays(tries: usize) -> ExponentialBackoff {
    ExponentialBuilder::new()
        .with_min_delay(FIRST_DELAY)
        .with_max_delay(LONGEST_DELAY)
        .with_max_times(tries)
        .with_jitter()
        .build()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunk(offset: u64, content: &str) -> LogChunk {
        LogChunk { content: content.into(), offset, complete: false }
    }

    #[test]
    fn no_byte_twice_and_none_left_out() {
        let mut cursor = Cursor { next: None };
        assert_eq!(cursor.place(Start::Tail(9)), Some(ApiStart::TailBytes(9)));
        assert_eq!(cursor.place(Start::Offset(3)), Some(ApiStart::Offset(3)));
        assert_eq!(cursor.place(Start::Beginning), None);
        let mut log = String::new();
        // A repeat, an overlap, one within what was seen, an empty one.
        for part in [
            chunk(10, "abc"),
            chunk(10, "abc"),
            chunk(11, "bcde"),
            chunk(11, "b"),
            chunk(15, ""),
            chunk(15, "f"),
        ] {
            let piece = cursor.take(part).unwrap();
            assert_eq!(piece.offset, 10 + log.len() as u64);
            log.push_str(str::from_utf8(&piece.content).unwrap());
        }
        assert_eq!(log, "abcdef");
        assert_eq!(cursor.place(Start::Tail(9)), Some(ApiStart::Offset(16)));
        assert!(matches!(cursor.take(chunk(17, "x")), Err(Failure::Gap { expected: 16, got: 17, .. })));
    }

    #[tokio::test(start_paused = true)]
    async fn patience_ends_and_is_renewed_by_news_or_a_stream_that_held() {
        let unavailable = || Failure::rpc(READING, tonic::Status::unavailable("x"));
        let mut patience = Patience::new(TRIES);
        for _ in 0..TRIES {
            assert!(patience.broken(unavailable()).is_ok());
            patience.pause().await;
        }
        assert!(patience.broken(unavailable()).is_err());
        patience.opened();
        assert!(patience.broken(unavailable()).is_err());
        patience.opened();
        tokio::time::advance(HELD).await;
        assert!(patience.broken(unavailable()).is_ok());
        patience.renew();
        for _ in 0..TRIES {
            assert!(patience.broken(unavailable()).is_ok());
        }
        assert!(patience.broken(unavailable()).is_err());
        let refused = Failure::rpc(READING, tonic::Status::out_of_range("x"));
        assert!(Patience::new(TRIES).broken(refused).is_err());
    }
}
