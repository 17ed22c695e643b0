//! The masked log on its way to the writer: its limit, the relay's own lines, and the steps that show in it.

use bytes::{Bytes, BytesMut};
use jiff::Timestamp;
use kiln_bus::logs::Source;
use kiln_contract::event::Progress;
use kiln_domain::step::StepTimes;
use tokio::sync::{mpsc, watch};

use crate::metrics::Metrics;
use crate::relay::Trouble;
use kiln_domain::mask::MASK;

/// Something to append.
#[derive(Debug)]
pub(crate) struct Item {
    pub(crate) bytes: Bytes,
    /// How far the log has got with its source, with these bytes.
    pub(crate) source: Source,
    pub(crate) complete: bool,
    /// With these bytes the log is at its limit, or was.
    pub(crate) limited: bool,
}

/// Items between the source and the append, each at most a chunk: a builder that writes faster than can be stored is
/// not read further.
pub(crate) const ITEMS: usize = 8;

pub(crate) struct Output {
    items: mpsc::Sender<Item>,
    /// The log's length once all items are stored.
    end: u64,
    limit: u64,
    source: Source,
    last_byte: Option<u8>,
    steps: StepTimes,
    step: watch::Sender<Option<Progress>>,
    metrics: Metrics,
}

impl Output {
    /// Of a log that has `end` bytes already.
    pub(crate) fn new(
        items: mpsc::Sender<Item>,
        step: watch::Sender<Option<Progress>>,
        (end, source): (u64, Source),
        limit: u64,
        metrics: Metrics,
    ) -> Self {
        Self { items, end, limit, source, last_byte: None, steps: StepTimes::default(), step, metrics }
    }

    /// Bytes that may be shown; where the limit comes between them, those before it.
    pub(crate) async fn plain(&mut self, mut bytes: Bytes, source: Source) -> Result<(), Trouble> {
        self.observe(&bytes);
        if self.is_limited() {
            return Ok(());
        }
        let room = self.limit - self.end;
        if bytes.len() as u64 <= room {
            return self.send(bytes, source).await;
        }
        bytes.truncate(usize::try_from(room).unwrap_or(usize::MAX));
        self.send_limit(bytes, source).await
    }

    /// The mask in place of a secret: it is shown whole or not at all.
    pub(crate) async fn mask(&mut self, source: Source) -> Result<(), Trouble> {
        self.observe(MASK);
        if self.is_limited() {
            return Ok(());
        }
        if MASK.len() as u64 <= self.limit - self.end {
            return self.send(Bytes::from_static(MASK), source).await;
        }
        self.send_limit(Bytes::new(), source).await
    }

    /// A line of the relay's own, with how far the source is done by it.
    pub(crate) async fn line(&mut self, text: &str, source: Source) -> Result<(), Trouble> {
        if self.is_limited() {
            return Ok(());
        }
        let line = self.own_line(text);
        self.send(line, source).await
    }

    /// The end of the log, with a last line of the relay's own: in one chunk, so that nobody says it again who takes over.
    pub(crate) async fn complete(mut self, last_words: Option<&str>) -> Result<(), Trouble> {
        let source = self.source.clone();
        let limited = self.is_limited();
        let words = last_words.filter(|_| !limited);
        let bytes = words.map(|words| self.own_line(words)).unwrap_or_default();
        self.push(Item { bytes, source, complete: true, limited }).await
    }

    /// The steps of an attempt begin anew.
    pub(crate) fn next_attempt(&mut self) {
        self.steps = StepTimes::default();
    }

    /// Nothing was written yet.
    pub(crate) fn is_empty(&self) -> bool {
        self.end == 0
    }

    /// The line that says so goes beyond the limit, in the same chunk as the last bytes before it: so the length alone
    /// tells the next writer, too.
    fn is_limited(&self) -> bool {
        self.end > self.limit
    }

    async fn send_limit(&mut self, bytes: Bytes, source: Source) -> Result<(), Trouble> {
        self.metrics.limited.inc();
        self.last_byte = bytes.last().copied().or(self.last_byte);
        let limit = self.limit;
        let line =
            self.own_line(&format!("the log ends here, at its limit of {limit} bytes; the build goes on"));
        let mut both = BytesMut::from(bytes.as_ref());
        both.extend_from_slice(&line);
        self.send(both.freeze(), source).await
    }

    fn own_line(&self, text: &str) -> Bytes {
        let before = if self.last_byte.is_some_and(|last| last != b'\n') { "\n" } else { "" };
        format!("{before}kiln: {text}\n").into()
    }

    async fn send(&mut self, bytes: Bytes, source: Source) -> Result<(), Trouble> {
        self.last_byte = bytes.last().copied().or(self.last_byte);
        self.end += bytes.len() as u64;
        let limited = self.is_limited();
        self.push(Item { bytes, source, complete: false, limited }).await
    }

    async fn push(&mut self, item: Item) -> Result<(), Trouble> {
        self.source = item.source.clone();
        self.items.send(item).await.map_err(|_| Trouble::WriterEnded)
    }

    /// Steps are read from what is shown: no secret is in them either.
    fn observe(&mut self, shown: &[u8]) {
        #[expect(clippy::disallowed_methods, reason = "a step's time is when its line was read")]
        self.steps.push(shown, Timestamp::now());
        let attempt = self.source.attempt;
        let Some(step) = self.steps.current() else { return };
        self.step.send_if_modified(|told| {
            let known = told.as_ref().is_some_and(|told| told.attempt == attempt && told.step == *step);
            if !known {
                *told = Some(Progress { attempt, step: step.clone() });
            }
            !known
        });
    }
}
