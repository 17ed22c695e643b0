//! The output of runs. A supervisor drops a reader that is slow for 5 s, and keeps 256 KiB: so each output is read as
//! fast as it comes into a buffer of ours, whoever reads that and however slowly.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use kiln_domain::engine::{Cursor, EngineError, Output};
use kiln_domain::id::RunId;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::cursor_key::CursorKey;
use crate::overlap::{Beginning, Found, Place, RING};
use crate::supervisor::{Heard, Messages, Supervisor, Trouble};
use crate::workspaces::Workspaces;

/// How long a read waits for something to read.
const WAIT: Duration = Duration::from_secs(2);
/// Of an output that nobody reads so much is kept; then its beginning goes.
const KEPT: usize = 16 << 20;
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// A connection that says nothing for so long is made anew, while the workspace runs.
const SILENCE: Duration = Duration::from_secs(300);
/// The pieces of a ring follow each other at once: after such a pause there is no more of it.
const WITHIN_RING: Duration = Duration::from_secs(1);
/// Once a workspace has stopped its supervisor is asked so often for what is left.
const LAST_TRIES: u32 = 5;

pub(crate) struct Outputs {
    http: reqwest::Client,
    workspaces: Arc<Workspaces>,
    key: Arc<CursorKey>,
    readings: Mutex<HashMap<RunId, Arc<Reading>>>,
    tasks: TaskTracker,
    stop: CancellationToken,
}

/// One run's output as far as it was read.
struct Reading {
    held: Mutex<Held>,
    changed: watch::Sender<()>,
    stop: CancellationToken,
}

#[derive(Default)]
struct Held {
    /// Of the first of `bytes`.
    begin: Place,
    bytes: BytesMut,
    /// After the last of them.
    end: Place,
    over: Option<Over>,
}

/// Why nothing is added any more.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Over {
    /// The task ended: it is whole.
    Whole,
    /// The supervisor is gone before we heard that.
    Gone,
}

impl Outputs {
    pub(crate) fn new(workspaces: Arc<Workspaces>, http: reqwest::Client, key: Arc<CursorKey>) -> Self {
        Self {
            http,
            workspaces,
            key,
            readings: Mutex::default(),
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
        }
    }

    pub(crate) async fn close(&self) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }

    pub(crate) fn forget(&self, run: &RunId) {
        if let Some(reading) = self.readings().remove(run) {
            reading.stop.cancel();
        }
    }

    pub(crate) async fn read(&self, run: &RunId, from: &Cursor, max: usize) -> Result<Output, EngineError> {
        if !self.workspaces.knows(run) && self.workspaces.ask(run).await?.is_none() {
            return Err(EngineError::Gone);
        }
        let place = self.key.place(from);
        let reading = self.reading(run, &place);
        let mut changed = reading.changed.subscribe();
        loop {
            if let Some(output) = reading.held().output(&place, max, &self.key) {
                return output;
            }
            if timeout(WAIT, changed.changed()).await.is_err() {
                return Ok(Output { bytes: Bytes::new(), from: from.clone(), end: false });
            }
        }
    }

    /// The reading of a run that has a place, or will have; else a new one that begins there.
    fn reading(&self, run: &RunId, place: &Place) -> Arc<Reading> {
        let mut readings = self.readings();
        if let Some(reading) = readings.get(run) {
            if reading.held().begin.offset <= place.offset {
                return reading.clone();
            }
            reading.stop.cancel();
        }
        let held = Held { begin: place.clone(), end: place.clone(), ..Held::default() };
        let reading = Arc::new(Reading {
            held: Mutex::new(held),
            changed: watch::Sender::default(),
            stop: self.stop.child_token(),
        });
        readings.insert(run.clone(), reading.clone());
        let (follower, workspaces, http, run) =
            (reading.clone(), self.workspaces.clone(), self.http.clone(), run.clone());
        self.tasks.spawn(async move {
            let stop = follower.stop.clone();
            stop.run_until_cancelled(follower.follow(&workspaces, http, &run)).await;
        });
        reading
    }

    fn readings(&self) -> MutexGuard<'_, HashMap<RunId, Arc<Reading>>> {
        self.readings.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Reading {
    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut Held)) {
        change(&mut self.held());
        self.changed.send_replace(());
    }

    /// Reads until the task has ended, or the workspace is gone with its supervisor.
    async fn follow(&self, workspaces: &Workspaces, http: reqwest::Client, run: &RunId) {
        let (mut pause, mut tries) = (FIRST_PAUSE, 0);
        loop {
            let before = self.held().end.offset;
            let state = workspaces.get(run);
            let trouble = match &state {
                Some(state) if !state.url.is_empty() => {
                    let (url, owner_token) = (state.url.clone(), state.owner_token.clone());
                    self.listen(&Supervisor { http: http.clone(), url, owner_token }).await
                }
                _ => Err(Trouble::NotYet),
            };
            match trouble {
                Ok(true) => return self.change(|held| held.over = Some(Over::Whole)),
                Ok(false) => {}
                Err(trouble) => {
                    tracing::debug!(run.id = %run, "the output of `{run}` can't be read now: {trouble}")
                }
            }
            if self.held().end.offset > before {
                (pause, tries) = (FIRST_PAUSE, 0);
            }
            if state.is_none_or(|state| state.end.is_some()) {
                tries += 1;
                if tries >= LAST_TRIES {
                    return self.change(|held| held.over = Some(Over::Gone));
                }
            }
            sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// Reads from one connection; whether the task's end was heard.
    async fn listen(&self, supervisor: &Supervisor) -> Result<bool, Trouble> {
        let mut messages = supervisor.listen().await?;
        let end = self.held().end.clone();
        let over = match end.offset {
            0 => self.begin(&mut messages).await?,
            _ => self.resume(&end, &mut messages).await?,
        };
        if let Some(over) = over {
            return Ok(over);
        }
        loop {
            match timeout(SILENCE, messages.next()).await.map_err(|_| Trouble::NotYet)?? {
                None => return Ok(false),
                Some(Heard::Exit) => return Ok(true),
                Some(Heard::Data(data)) => self.change(|held| held.push(&data)),
            }
        }
    }

    /// The first that is read of an output, held back until it is told whether there may have been more before it. Whether the
    /// task's end was heard, if the connection is over.
    async fn begin(&self, messages: &mut Messages) -> Result<Option<bool>, Trouble> {
        let mut first = BytesMut::new();
        let over = loop {
            let within = if first.is_empty() { SILENCE } else { WITHIN_RING };
            let heard = match timeout(within, messages.next()).await {
                Ok(heard) => heard?,
                Err(_) if first.is_empty() => return Err(Trouble::NotYet),
                Err(_) => break None,
            };
            let data = match heard {
                None => break Some(false),
                Some(Heard::Exit) => break Some(true),
                Some(Heard::Data(data)) => data,
            };
            let beginning = Beginning::after(first.len(), data.len());
            first.extend_from_slice(&data);
            match beginning {
                Beginning::Unclear => {}
                Beginning::Whole => break None,
                Beginning::MayBeMissing => {
                    let line = format!(
                        "kiln: output may be missing before this: a supervisor keeps {RING} bytes, and had so many when it was first reached\n"
                    );
                    self.change(|held| held.push(line.as_bytes()));
                    break None;
                }
            }
        };
        self.change(|held| held.push(&first));
        Ok(over)
    }

    /// What is replayed to a new reader, until the place where we are is found in it. Whether the task's end was heard, if the
    /// connection is over.
    async fn resume(&self, end: &Place, messages: &mut Messages) -> Result<Option<bool>, Trouble> {
        let mut replay = BytesMut::new();
        loop {
            let heard = timeout(SILENCE, messages.next()).await.map_err(|_| Trouble::NotYet)??;
            let over = match heard {
                None => return Ok(Some(false)),
                Some(Heard::Exit) => true,
                Some(Heard::Data(data)) => {
                    replay.extend_from_slice(&data);
                    false
                }
            };
            let skipped = match end.find(&replay) {
                Found::NotYet if !over => continue,
                Found::After(skipped) => skipped,
                Found::NotYet | Found::Lost => {
                    let line = format!(
                        "\nkiln: output is missing here: more than the {RING} bytes that a supervisor keeps were written while it could not be reached\n"
                    );
                    self.change(|held| held.push(line.as_bytes()));
                    0
                }
            };
            let rest = replay.split_off(skipped.min(replay.len()));
            self.change(|held| held.push(&rest));
            return Ok(over.then_some(true));
        }
    }
}

impl Held {
    fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
        self.end = std::mem::take(&mut self.end).advanced(bytes);
        if self.bytes.len() > KEPT {
            let gone = self.bytes.split_to(self.bytes.len() - KEPT / 2);
            self.begin = std::mem::take(&mut self.begin).advanced(&gone);
        }
    }

    /// What follows a place; `None` while there is nothing yet.
    fn output(&self, place: &Place, max: usize, key: &CursorKey) -> Option<Result<Output, EngineError>> {
        let begin = self.begin.offset;
        let from = usize::try_from(place.offset.saturating_sub(begin)).unwrap_or(usize::MAX);
        let bytes = self.bytes.get(from..).unwrap_or_default();
        let bytes = bytes.get(..bytes.len().min(max)).unwrap_or_default();
        let is_last = from.saturating_add(bytes.len()) >= self.bytes.len();
        match self.over {
            None if bytes.is_empty() => None,
            Some(Over::Gone) if bytes.is_empty() => Some(Err(EngineError::Gone)),
            over => Some(Ok(Output {
                bytes: Bytes::copy_from_slice(bytes),
                from: key.cursor(if place.offset < begin { &self.begin } else { place }),
                end: over == Some(Over::Whole) && is_last,
            })),
        }
    }
}
