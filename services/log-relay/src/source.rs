//! Where a log comes from: the outputs of all attempts of a build, one after another, masked.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use kiln_bus::journal::Entry;
use kiln_bus::logs::{CHUNK_BYTES, Source};
use kiln_domain::engine::{Cursor, Engine, EngineError};
use kiln_domain::failure::FailureReason;
use kiln_domain::id::{BuildId, RunId};
use kiln_domain::record::{Record, State};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::held::Held;
use crate::metrics::Metrics;
use crate::output::Output;
use crate::relay::Trouble;
use kiln_domain::mask::{Masker, Patterns, Piece};

/// Reads a build's outputs until the build is over and they have ended.
pub(crate) struct Reading {
    pub(crate) id: BuildId,
    pub(crate) engine: Arc<dyn Engine>,
    pub(crate) entries: watch::Receiver<Arc<Entry>>,
    /// `None` where the secrets could not be opened: then no raw byte is passed on.
    pub(crate) patterns: Option<Arc<Patterns>>,
    pub(crate) output: Output,
    pub(crate) patience: Duration,
    pub(crate) metrics: Metrics,
}

/// What the journal says of an attempt.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Waiting,
    Running,
    /// A later attempt is on, or the build is over.
    Over,
}

/// An attempt's masking, and where its bytes came from.
struct Attempt {
    number: u32,
    run: RunId,
    masker: Option<Masker>,
    held: Held,
}

/// What a builder writes within this long becomes one chunk, unless it fills one: each chunk has its price in the engine, in
/// the stream and with every follower, and of hundreds of builders that write line by line these would be all that anybody
/// does. After a pause the first bytes are passed on at once.
const GATHER: Duration = Duration::from_millis(40);
/// What an attempt told of itself.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Told {
    NotStarted,
    Nothing,
    Something,
}

/// A run that the journal calls started and the engine doesn't know is looked for again after this long.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

impl Reading {
    /// From a place in the source to the log's completion.
    pub(crate) async fn run(mut self, from: Source) -> Result<(), Trouble> {
        let Source { attempt: mut number, mut cursor } = from;
        loop {
            let told = self.attempt(number, cursor).await?;
            let record = self.entries.borrow().record.clone();
            if record.attempt <= number {
                let last_words = self.last_words(&record, told);
                return self.output.complete(last_words.as_deref()).await;
            }
            let line = format!("attempt {number} was lost; attempt {} follows", number + 1);
            number += 1;
            cursor = Cursor::default();
            self.output.next_attempt();
            self.output.line(&line, Source { attempt: number, cursor: cursor.clone() }).await?;
        }
    }

    /// Reads one attempt's output.
    async fn attempt(&mut self, number: u32, from: Cursor) -> Result<Told, Trouble> {
        let mut attempt = Attempt {
            number,
            run: RunId::new(&self.id, number),
            masker: self.patterns.clone().map(Masker::new),
            held: Held::at(from.clone()),
        };
        let mut told = if from == Cursor::default() { Told::NotStarted } else { Told::Something };
        let mut cursor = from;
        let mut pause = Duration::from_millis(100);
        // Since when the attempt is over and its output stands still.
        let mut quiet: Option<Instant> = None;
        loop {
            let stage = self.stage(number);
            if stage == Stage::Waiting {
                self.change().await?;
                continue;
            }
            if stage == Stage::Running || self.has_handle(number) {
                told = told.max(Told::Nothing);
            }
            let error = match self.engine.read(&attempt.run, &cursor, CHUNK_BYTES).await {
                Ok(read) => {
                    let gathered = Instant::now() + GATHER;
                    told = told.max(if read.bytes.is_empty() { Told::Nothing } else { Told::Something });
                    pause = Duration::from_millis(100);
                    let length = read.bytes.len();
                    if length > 0 {
                        quiet = None;
                        cursor = self.engine.advance(&read.from, &read.bytes);
                        self.pass(&mut attempt, read.from, read.bytes).await?;
                    }
                    if read.end {
                        self.flush(&mut attempt).await?;
                        self.over(number).await?;
                        return Ok(told);
                    }
                    if (1..CHUNK_BYTES).contains(&length) {
                        tokio::time::sleep_until(gathered).await;
                    }
                    None
                }
                Err(error) => Some(error),
            };
            if stage == Stage::Over {
                let waited = quiet.get_or_insert_with(Instant::now).elapsed();
                let gone = error == Some(EngineError::Gone);
                if gone || waited >= self.patience {
                    self.give_up(attempt, told != Told::NotStarted, gone).await?;
                    return Ok(told);
                }
            }
            match error {
                None => {}
                Some(EngineError::Gone) => {
                    // Its start is not visible yet, or its end is not told yet.
                    if let Ok(changed) = tokio::time::timeout(LOOK_AGAIN, self.change()).await {
                        changed?;
                    }
                }
                Some(error) => {
                    tracing::debug!(build.id = %self.id, "the output can't be read now: {error}");
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(Duration::from_secs(2));
                }
            }
        }
    }

    async fn give_up(&mut self, mut attempt: Attempt, started: bool, gone: bool) -> Result<(), Trouble> {
        self.flush(&mut attempt).await?;
        if !started {
            return Ok(());
        }
        self.metrics.unfinished.inc();
        let why = if gone { "is gone" } else { "could not be read in time" };
        tracing::warn!(build.id = %self.id, "the end of the output of attempt {} {why}", attempt.number);
        let source = Source { attempt: attempt.number, cursor: attempt.held.next().clone() };
        self.output.line(&format!("what attempt {} wrote last {why}", attempt.number), source).await
    }

    async fn pass(&mut self, attempt: &mut Attempt, from: Cursor, bytes: Bytes) -> Result<(), Trouble> {
        let Some(masker) = &mut attempt.masker else { return Ok(()) };
        let pieces = masker.push(&bytes);
        attempt.held.push(from, bytes);
        self.show(attempt, pieces).await
    }

    async fn flush(&mut self, attempt: &mut Attempt) -> Result<(), Trouble> {
        let pieces = attempt.masker.as_mut().map(Masker::finish).unwrap_or_default();
        self.show(attempt, pieces).await
    }

    async fn show(&mut self, attempt: &mut Attempt, pieces: Vec<Piece>) -> Result<(), Trouble> {
        let engine = self.engine.clone();
        let mut after =
            |count| Source { attempt: attempt.number, cursor: attempt.held.take(&*engine, count) };
        for piece in pieces {
            match piece {
                Piece::Masked { raw } => self.output.mask(after(raw)).await?,
                Piece::Plain(mut bytes) => {
                    while !bytes.is_empty() {
                        let part = bytes.split_to(bytes.len().min(CHUNK_BYTES));
                        let source = after(part.len());
                        self.output.plain(part, source).await?;
                    }
                }
            }
        }
        Ok(())
    }

    /// What a reader must know whom the builder's output, if there is any, does not tell how the build ended.
    fn last_words(&self, record: &Record, told: Told) -> Option<String> {
        let Some(patterns) = self.patterns.clone() else {
            let words =
                "the log is withheld: the build's secrets could not be opened, so they could not be masked";
            return Some(words.to_owned());
        };
        let attempt = match record.attempt {
            _ if self.output.is_empty() => "it".to_owned(),
            attempt => format!("attempt {attempt}"),
        };
        let why = if record.message.is_empty() { String::new() } else { format!(": {}", record.message) };
        let nothing = self.output.is_empty();
        let words = match (record.state, told) {
            (State::Cancelled, Told::NotStarted) => {
                format!("the build was cancelled before {attempt} started")
            }
            (State::Cancelled, Told::Nothing) => {
                format!("the build was cancelled before {attempt} wrote anything")
            }
            (State::Failed, Told::NotStarted) => format!("the build failed before {attempt} started{why}"),
            (State::Failed, Told::Nothing) => {
                format!("the build failed before {attempt} wrote anything{why}")
            }
            (State::Failed, Told::Something)
                if record.reason.is_some_and(FailureReason::is_found_afterwards) =>
            {
                format!("the build failed{why}")
            }
            (State::Succeeded, Told::NotStarted) if nothing => {
                "nothing was run: the image was there".to_owned()
            }
            (State::Succeeded, Told::Nothing) if nothing => "the build wrote nothing".to_owned(),
            _ => return None,
        };
        let mut masker = Masker::new(patterns);
        let mut pieces = masker.push(&Bytes::from(words));
        pieces.extend(masker.finish());
        let shown: Vec<_> = pieces.iter().map(Piece::shown).collect();
        Some(String::from_utf8_lossy(&shown.concat()).into_owned())
    }

    fn stage(&self, number: u32) -> Stage {
        let record = &self.entries.borrow().record;
        if record.attempt > number || record.state.is_terminal() {
            Stage::Over
        } else if record.attempt == number && record.handle.is_some() {
            Stage::Running
        } else {
            Stage::Waiting
        }
    }

    fn has_handle(&self, number: u32) -> bool {
        let record = &self.entries.borrow().record;
        record.attempt == number && record.handle.is_some()
    }

    async fn over(&mut self, number: u32) -> Result<(), Trouble> {
        while self.stage(number) != Stage::Over {
            self.change().await?;
        }
        Ok(())
    }

    async fn change(&mut self) -> Result<(), Trouble> {
        self.entries.changed().await.map_err(|_| Trouble::WriterEnded)
    }
}
