//! What every engine must do: one suite, run on each of them.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use async_trait::async_trait;
use kiln_domain::engine::{Cursor, Engine, EngineError, Observed};
use kiln_domain::id::RunId;
use kiln_domain::reference::Digest;
use kiln_domain::run::{Outcome, RunResult, RunSecrets, RunSpec};
use tokio::time::{sleep, timeout};

/// Longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(60);

/// A line that the output of a [`Job::Endless`] contains once its endless step runs.
pub const ENDLESS: &str = "the endless step has begun";

/// What a run is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Job {
    /// Pushes an image, and writes more than a hundred bytes while it does.
    Succeeds,
    /// Has an outcome that is a failure.
    Fails,
    /// Writes [`ENDLESS`] and works until it is made to stop.
    Endless,
}

/// A place where an engine runs builders.
#[async_trait]
pub trait Place: Send + Sync {
    /// An engine that knows no more of the place than another process would.
    fn engine(&self) -> Arc<dyn Engine>;

    /// A run that was never started.
    fn job(&self, job: Job) -> Result<(RunSpec, RunSecrets)>;

    /// What is at a run's target.
    async fn pushed(&self, spec: &RunSpec) -> Result<Option<Digest>>;

    /// Whether anything of the run lives or is left but its revocation: processes, mounts, files.
    fn left(&self, run: &RunId) -> Result<Vec<String>>;
}

/// Runs the suite; the error says what the engine did wrong.
pub async fn conformance(place: &dyn Place) -> Result<()> {
    absent(place).await.context("a run that was never started")?;
    succeeds(place).await.context("a run that succeeds")?;
    fails(place).await.context("a run that fails")?;
    adopted(place).await.context("a run that another engine started")?;
    raced(place).await.context("a run that many start at once")?;
    revoked_before(place).await.context("a run that was revoked before its start")?;
    revoked_during(place).await.context("a run that is revoked while it works")?;
    Ok(())
}

async fn absent(place: &dyn Place) -> Result<()> {
    let (engine, run) = (place.engine(), place.job(Job::Succeeds)?.0.run);
    ensure!(engine.observe(&run).await? == Observed::Absent, "it is not absent");
    ensure!(engine.read(&run, &Cursor::default(), 10).await == Err(EngineError::Gone), "it has output");
    engine.cancel(&run).await.context("cancel")?;
    engine.remove(&run).await.context("remove")?;
    ensure!(engine.observe(&run).await? == Observed::Absent, "it is not absent after cancel and remove");
    Ok(())
}

async fn succeeds(place: &dyn Place) -> Result<()> {
    let (engine, (spec, secrets)) = (place.engine(), place.job(Job::Succeeds)?);
    let handle = engine.start(&spec, &secrets).await?;
    ensure!(engine.start(&spec, &secrets).await? == handle, "a second start gives another handle");
    ensure!(engine.observe(&spec.run).await? != Observed::Absent, "it is absent after its start");
    let ended = timeout(PATIENCE, engine.ended(&spec.run, &handle)).await??;
    let digest = pushed(ended.outcome.as_ref())?;
    ensure!(ended.recorded.as_ref() == Some(&digest), "the digest was not recorded before the push");
    ensure!(place.pushed(&spec).await? == Some(digest), "the outcome's digest is not at the target");
    ensure!(engine.observe(&spec.run).await? == Observed::Ended(ended.clone()), "observe and ended differ");
    ensure!(engine.start(&spec, &secrets).await? == handle, "a start after the end gives another handle");
    ensure!(
        engine.observe(&spec.run).await? == Observed::Ended(ended),
        "a start after the end started it anew"
    );
    engine.cancel(&spec.run).await.context("a cancel after the end")?;

    let whole = output(&*engine, &spec.run, Cursor::default(), 1 << 20).await?;
    ensure!(whole.len() > 100, "the output is missing: {} bytes", whole.len());
    ensure!(
        output(&*engine, &spec.run, Cursor::default(), 7).await? == whole,
        "in pieces it is another output"
    );
    for from in [0, 1, whole.len() / 2, whole.len()] {
        let (before, after) = whole.split_at(from);
        let cursor = engine.advance(&Cursor::default(), before);
        let other = place.engine();
        ensure!(
            output(&*other, &spec.run, cursor, 64).await? == after,
            "from byte {from} it is another output"
        );
    }

    for _ in 0..2 {
        engine.remove(&spec.run).await.context("remove")?;
    }
    ensure!(engine.observe(&spec.run).await? == Observed::Absent, "it is there after its removal");
    ensure!(
        engine.read(&spec.run, &Cursor::default(), 10).await == Err(EngineError::Gone),
        "its output is there"
    );
    ensure!(engine.start(&spec, &secrets).await == Err(EngineError::Revoked), "it starts after its removal");
    nothing_left(place, &spec.run)
}

async fn fails(place: &dyn Place) -> Result<()> {
    let (engine, (spec, secrets)) = (place.engine(), place.job(Job::Fails)?);
    let handle = engine.start(&spec, &secrets).await?;
    let ended = timeout(PATIENCE, engine.ended(&spec.run, &handle)).await??;
    let failed = matches!(&ended.outcome, Some(Outcome { result: RunResult::Failed(_), .. }));
    ensure!(failed && ended.recorded.is_none(), "it ended as {ended:?}");
    ensure!(place.pushed(&spec).await?.is_none(), "it pushed");
    engine.remove(&spec.run).await?;
    nothing_left(place, &spec.run)
}

async fn adopted(place: &dyn Place) -> Result<()> {
    let (first, (spec, secrets)) = (place.engine(), place.job(Job::Endless)?);
    let handle = first.start(&spec, &secrets).await?;
    let second = place.engine();
    drop(first);
    ensure!(second.observe(&spec.run).await? == Observed::Running(handle.clone()), "it is not seen running");
    ensure!(second.start(&spec, &secrets).await? == handle, "it was started twice");
    endless_begun(&*second, &spec.run).await?;
    ensure!(second.observe(&spec.run).await? == Observed::Running(handle.clone()), "it runs no more");
    second.cancel(&spec.run).await?;
    second.cancel(&spec.run).await.context("a second cancel")?;
    let ended =
        timeout(PATIENCE, second.ended(&spec.run, &handle)).await.context("the cancel ended nothing")??;
    ensure!(ended.recorded.is_none() && place.pushed(&spec).await?.is_none(), "it pushed");
    let text = output(&*place.engine(), &spec.run, Cursor::default(), 1 << 20).await?;
    ensure!(String::from_utf8_lossy(&text).contains(ENDLESS), "its output is lost");
    second.remove(&spec.run).await?;
    nothing_left(place, &spec.run)
}

async fn raced(place: &dyn Place) -> Result<()> {
    let (spec, secrets) = place.job(Job::Succeeds)?;
    let mut starts = tokio::task::JoinSet::new();
    for _ in 0..8 {
        let (engine, spec, secrets) = (place.engine(), spec.clone(), secrets.clone());
        starts.spawn(async move { engine.start(&spec, &secrets).await });
    }
    let handles = starts.join_all().await.into_iter().collect::<Result<Vec<_>, _>>()?;
    let handle = handles.first().context("no handle")?;
    ensure!(handles.iter().all(|other| other == handle), "they got several handles");
    let engine = place.engine();
    let ended = timeout(PATIENCE, engine.ended(&spec.run, handle)).await??;
    pushed(ended.outcome.as_ref())?;
    engine.remove(&spec.run).await?;
    nothing_left(place, &spec.run)
}

async fn revoked_before(place: &dyn Place) -> Result<()> {
    let (engine, (spec, secrets)) = (place.engine(), place.job(Job::Succeeds)?);
    engine.revoke(&spec.run).await?;
    engine.revoke(&spec.run).await.context("a second revocation")?;
    ensure!(place.engine().start(&spec, &secrets).await == Err(EngineError::Revoked), "it starts");
    engine.remove(&spec.run).await?;
    ensure!(
        engine.start(&spec, &secrets).await == Err(EngineError::Revoked),
        "it starts once it was removed"
    );
    ensure!(engine.observe(&spec.run).await? == Observed::Absent, "it is not absent");
    nothing_left(place, &spec.run)
}

async fn revoked_during(place: &dyn Place) -> Result<()> {
    let (engine, (spec, secrets)) = (place.engine(), place.job(Job::Endless)?);
    let handle = engine.start(&spec, &secrets).await?;
    endless_begun(&*engine, &spec.run).await?;
    engine.revoke(&spec.run).await?;
    engine.cancel(&spec.run).await?;
    let ended = timeout(PATIENCE, engine.ended(&spec.run, &handle)).await.context("it goes on")??;
    ensure!(ended.recorded.is_none() && place.pushed(&spec).await?.is_none(), "it pushed");
    ensure!(engine.start(&spec, &secrets).await == Err(EngineError::Revoked), "it starts again");
    engine.remove(&spec.run).await?;
    nothing_left(place, &spec.run)
}

fn pushed(outcome: Option<&Outcome>) -> Result<Digest> {
    match outcome {
        Some(Outcome { result: RunResult::Pushed(digest), .. }) => Ok(digest.clone()),
        other => bail!("it did not push, but ended with {other:?}"),
    }
}

fn nothing_left(place: &dyn Place, run: &RunId) -> Result<()> {
    let left = place.left(run)?;
    ensure!(left.is_empty(), "after its removal there is still {left:?}");
    Ok(())
}

async fn endless_begun(engine: &dyn Engine, run: &RunId) -> Result<()> {
    let begun = async {
        let (mut cursor, mut text) = (Cursor::default(), Vec::new());
        while !String::from_utf8_lossy(&text).contains(ENDLESS) {
            let output = engine.read(run, &cursor, 4096).await?;
            ensure!(!output.end, "it ended by itself: {}", String::from_utf8_lossy(&text));
            cursor = engine.advance(&output.from, &output.bytes);
            text.extend_from_slice(&output.bytes);
        }
        Ok(())
    };
    timeout(PATIENCE, begun).await.context("the endless step does not begin")?
}

/// Reads an output from a cursor to its end.
pub async fn output(engine: &dyn Engine, run: &RunId, from: Cursor, max: usize) -> Result<Vec<u8>> {
    let reading = async {
        let (mut cursor, mut text) = (from, Vec::new());
        loop {
            let output = match engine.read(run, &cursor, max).await {
                Err(EngineError::Unavailable(_)) => {
                    sleep(Duration::from_millis(20)).await;
                    continue;
                }
                other => other?,
            };
            ensure!(output.bytes.len() <= max, "more than was asked for");
            cursor = engine.advance(&output.from, &output.bytes);
            text.extend_from_slice(&output.bytes);
            if output.end {
                return Ok(text);
            }
        }
    };
    timeout(PATIENCE, reading).await.context("the output does not end")?
}
