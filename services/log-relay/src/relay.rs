//! One build's log: claimed, written, completed.

use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use kiln_bus::BusError;
use kiln_bus::holders::Holders;
use kiln_bus::journal::Entry;
use kiln_bus::logs::{AppendError, CHUNK_BYTES, LogTail, LogWriter, Logs};
use kiln_bus::seal::OpenKey;
use kiln_bus::secrets::{self, SecretsBucket};
use kiln_contract::event::Progress;
use kiln_domain::engine::Engine;
use kiln_domain::id::{BuildId, InstanceId};
use kiln_domain::rank::rank;
use tokio::sync::{mpsc, watch};

use crate::config::Config;
use crate::metrics::Metrics;
use crate::output::{ITEMS, Item, Output};
use crate::source::Reading;
use kiln_domain::mask::Patterns;

/// What all logs of this process share.
pub(crate) struct Shared {
    pub(crate) config: Config,
    pub(crate) logs: Logs,
    pub(crate) secrets: SecretsBucket,
    pub(crate) engine: Arc<dyn Engine>,
    pub(crate) open_key: OpenKey,
    pub(crate) holders: Holders,
    pub(crate) metrics: Metrics,
}

/// How this relay's part in a log ended.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Left {
    Complete,
    /// A live relay writes it.
    Elsewhere(InstanceId),
}

/// Why a log was left before its end. It is tried again, from its tail.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Trouble {
    #[error(transparent)]
    Append(#[from] AppendError),
    #[error(transparent)]
    Bus(#[from] BusError),
    /// Shown to nobody: the writer's own error comes first.
    #[error("the writer has ended")]
    WriterEnded,
}

/// How much later each rank tries than the one before it.
const RANK: Duration = Duration::from_millis(20);
/// A build's entry may not have come to every replica when its first event has.
const ENTRY_VISIBLE: Duration = Duration::from_secs(5);
/// At most two steps a second are told.
const TELL_EVERY: Duration = Duration::from_millis(500);

/// Writes a build's log to its end, unless it is complete or a live relay writes it.
pub(crate) async fn tend(
    shared: &Arc<Shared>,
    id: &BuildId,
    me: &InstanceId,
    entries: watch::Receiver<Arc<Entry>>,
) -> Result<Left, Trouble> {
    let mut tail = shared.logs.tail(id).await?;
    if let Some(left) = not_ours(shared, me, tail.as_ref()).await? {
        return Ok(left);
    }
    let before = rank(id.as_str(), me, &shared.holders.live());
    if before > 0 {
        tokio::time::sleep(RANK * u32::try_from(before).unwrap_or(u32::MAX)).await;
        tail = shared.logs.tail(id).await?;
        if let Some(left) = not_ours(shared, me, tail.as_ref()).await? {
            return Ok(left);
        }
    }
    let mut writer = shared.logs.claim(id, me, tail.as_ref()).await?;
    writer.keeps_to(shared.config.max_log_bytes);
    if tail.is_some_and(|tail| tail.writer != *me) {
        shared.metrics.taken_over.inc();
        tracing::info!(build.id = %id, "took over the log of {id} at byte {}", writer.end());
    }
    let writing = shared.metrics.writing();
    write(shared, id, writer, entries).await?;
    drop(writing);
    shared.metrics.completed.inc();
    Ok(Left::Complete)
}

async fn not_ours(shared: &Shared, me: &InstanceId, tail: Option<&LogTail>) -> Result<Option<Left>, Trouble> {
    Ok(match tail {
        None => None,
        Some(tail) if tail.complete => Some(Left::Complete),
        Some(tail) if tail.writer == *me => None,
        Some(tail) => {
            let free =
                !shared.holders.is_live(&tail.writer) && shared.holders.confirm_dead(&tail.writer).await?;
            (!free).then(|| Left::Elsewhere(tail.writer.clone()))
        }
    })
}

async fn write(
    shared: &Shared,
    id: &BuildId,
    writer: LogWriter,
    entries: watch::Receiver<Arc<Entry>>,
) -> Result<(), Trouble> {
    let patterns = patterns(shared, id).await?;
    let (items, to_append) = mpsc::channel(ITEMS);
    let (step, told) = watch::channel(None);
    let from = writer.source().clone();
    let output = Output::new(
        items,
        step,
        (writer.end(), from.clone()),
        shared.config.max_log_bytes,
        shared.metrics.clone(),
    );
    let reading = Reading {
        id: id.clone(),
        engine: shared.engine.clone(),
        entries,
        patterns: patterns.map(Arc::new),
        output,
        patience: shared.config.output_patience(),
        metrics: shared.metrics.clone(),
    };
    tokio::try_join!(
        reading.run(from),
        append(writer, to_append, &shared.metrics),
        tell_steps(&shared.logs, id, told)
    )?;
    Ok(())
}

/// What to mask; `None` where the secrets can't be opened.
async fn patterns(shared: &Shared, id: &BuildId) -> Result<Option<Patterns>, Trouble> {
    let give_up = tokio::time::Instant::now() + ENTRY_VISIBLE;
    let sealed = loop {
        match shared.secrets.get(id).await? {
            Some(sealed) => break Some(sealed),
            None if tokio::time::Instant::now() >= give_up => break None,
            None => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    };
    let withheld = |why: &dyn std::fmt::Display| {
        shared.metrics.withheld.inc();
        tracing::error!(build.id = %id, "the log of {id} is withheld: {why}");
        Ok(None)
    };
    let Some(sealed) = sealed else { return withheld(&"its entry in the secrets bucket is missing") };
    match secrets::open(&shared.open_key, &sealed) {
        Err(error) => withheld(&error),
        Ok(secrets) => match Patterns::of(secrets.hidden().iter().map(Vec::as_slice)) {
            Ok(patterns) => Ok(Some(patterns)),
            Err(error) => withheld(&error),
        },
    }
}

/// Appends what comes, one in flight; what arrives meanwhile becomes the next chunk.
async fn append(
    mut writer: LogWriter,
    mut items: mpsc::Receiver<Item>,
    metrics: &Metrics,
) -> Result<(), Trouble> {
    let mut waiting = None;
    loop {
        let first = match waiting.take() {
            Some(item) => item,
            None => match items.recv().await {
                Some(item) => item,
                None => return Err(Trouble::WriterEnded),
            },
        };
        let Item { mut bytes, mut source, mut complete, mut limited } = first;
        let mut joined: Option<BytesMut> = None;
        while !complete && let Ok(item) = items.try_recv() {
            let length = joined.as_ref().map_or(bytes.len(), BytesMut::len);
            if length + item.bytes.len() > CHUNK_BYTES {
                waiting = Some(item);
                break;
            }
            joined.get_or_insert_with(|| BytesMut::from(bytes.as_ref())).extend_from_slice(&item.bytes);
            (source, complete, limited) = (item.source, item.complete, item.limited);
        }
        if let Some(joined) = joined {
            bytes = joined.freeze();
        }
        let length = bytes.len() as u64;
        if limited {
            writer.mark_limited();
        }
        match writer.append(bytes.clone(), source.clone(), complete).await {
            Err(AppendError::Emptied { id, end }) => {
                tracing::error!(build.id = %id, "what was stored of the log of {id} is gone, up to byte {end}; it goes on from there");
                metrics.emptied.inc();
                say_emptied(&mut writer, end).await?;
                writer.append(bytes, source, complete).await?;
            }
            appended => appended?,
        }
        metrics.chunks.inc();
        metrics.bytes.inc_by(length);
        if complete {
            return Ok(());
        }
    }
}

/// Says in the log itself that what was before is lost, and counts on from there: an offset means what it meant.
async fn say_emptied(writer: &mut LogWriter, end: u64) -> Result<(), AppendError> {
    let line =
        format!("\nkiln: the {end} bytes of the log before this line are lost: the bus keeps them no more\n");
    let source = writer.source().clone();
    writer.append(line.into(), source, false).await
}

async fn tell_steps(
    logs: &Logs,
    id: &BuildId,
    mut steps: watch::Receiver<Option<Progress>>,
) -> Result<(), Trouble> {
    while steps.changed().await.is_ok() {
        let step = steps.borrow_and_update().clone();
        if let Some(step) = step
            && let Err(error) = logs.publish_progress(id, &step).await
        {
            tracing::debug!(build.id = %id, "a step was not told: {error}");
        }
        tokio::time::sleep(TELL_EVERY).await;
    }
    Ok(())
}
