//! A fake engine: runs whose output a test releases piece by piece, and which end when it says so. It runs nothing.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use kiln_domain::engine::{Cursor, Engine, EngineError, Handle, Observed, Output};
use kiln_domain::id::RunId;
use kiln_domain::run::{Ended, RunSecrets, RunSpec};
use tokio::sync::watch;

/// An engine of runs that a test plays.
#[derive(Debug, Default)]
pub struct FakeEngine {
    place: Arc<Place>,
    /// What it was asked to do to runs, not what it was asked about them.
    acts: Mutex<Vec<(RunId, &'static str)>>,
}

/// Where the runs are.
#[derive(Debug, Default)]
struct Place {
    runs: Mutex<HashMap<RunId, Run>>,
    starts: watch::Sender<Starts>,
    /// A run whose removal takes until the test says otherwise.
    kept: watch::Sender<Option<RunId>>,
    changed: watch::Sender<()>,
}

/// What becomes of a start.
#[derive(Clone, Debug, Default)]
enum Starts {
    #[default]
    Made,
    /// The engine says why not.
    Refused(String),
    /// It takes until the test says otherwise.
    Held,
}

#[derive(Debug, Default)]
struct Run {
    output: BytesMut,
    /// Set once nothing of it can push any more; its output has ended then, too.
    ended: Option<Ended>,
    cancelled: bool,
    revoked: bool,
    /// Started, and not removed.
    there: bool,
    /// How often somebody asked for its start.
    asked: usize,
}

/// How long a read waits for output. The contract says "some seconds"; a test has less.
const WAIT: Duration = Duration::from_millis(200);
/// Engines ask a disk or a server how a run ended: a timer that is up at once is quicker.
const ANSWER: Duration = Duration::from_millis(10);

impl FakeEngine {
    /// The engine of another process, with the same runs.
    pub fn elsewhere(&self) -> Self {
        Self { place: self.place.clone(), acts: Mutex::default() }
    }

    /// What this engine, and no other of the same runs, was asked to do to a run: start, cancel, revoke, remove it.
    pub fn acts(&self, run: &RunId) -> Vec<&'static str> {
        let acts = self.acts.lock().unwrap_or_else(PoisonError::into_inner);
        acts.iter().filter(|(of, _)| of == run).map(|(_, act)| *act).collect()
    }

    fn act(&self, run: &RunId, act: &'static str) {
        self.acts.lock().unwrap_or_else(PoisonError::into_inner).push((run.clone(), act));
    }

    /// As if the run had been started, also by another process.
    pub fn begin(&self, run: &RunId) -> Handle {
        self.change(run, |run| run.there = true);
        Handle::new(format!("fake {run}"))
    }

    /// From now on no builder starts: the engine says why.
    pub fn refuse_starts(&self, why: &str) {
        self.place.starts.send_replace(Starts::Refused(why.to_owned()));
    }

    /// From now on a start takes until [`FakeEngine::make_starts`].
    pub fn hold_starts(&self) {
        self.place.starts.send_replace(Starts::Held);
    }

    /// Builders start again.
    pub fn make_starts(&self) {
        self.place.starts.send_replace(Starts::Made);
    }

    /// From now on the removal of this run takes until [`FakeEngine::make_removals`].
    pub fn hold_removal(&self, run: &RunId) {
        self.place.kept.send_replace(Some(run.clone()));
    }

    /// Every run can be removed again.
    pub fn make_removals(&self) {
        self.place.kept.send_replace(None);
    }

    /// How often a run was asked to start.
    pub fn asked_to_start(&self, run: &RunId) -> usize {
        self.runs().get(run).map_or(0, |run| run.asked)
    }

    /// The builder writes.
    pub fn write(&self, run: &RunId, output: &[u8]) {
        self.change(run, |run| run.output.extend_from_slice(output));
    }

    /// The builder ends.
    pub fn end(&self, run: &RunId, ended: Ended) {
        self.change(run, |run| run.ended = Some(ended));
    }

    /// The run and its output vanish, as with the machine that they were on.
    pub fn vanish(&self, run: &RunId) {
        self.change(run, |run| run.there = false);
    }

    /// Whether somebody asked that the run end.
    pub fn is_cancelled(&self, run: &RunId) -> bool {
        self.runs().get(run).is_some_and(|run| run.cancelled)
    }

    /// Whether the run was revoked.
    pub fn is_revoked(&self, run: &RunId) -> bool {
        self.runs().get(run).is_some_and(|run| run.revoked)
    }

    /// Whether anything of the run is there: it was started, and neither removed nor lost.
    pub fn is_there(&self, run: &RunId) -> bool {
        self.runs().get(run).is_some_and(|run| run.there)
    }

    /// Returns once somebody asked that the run end.
    pub async fn until_cancelled(&self, run: &RunId) {
        self.until(|| self.is_cancelled(run)).await;
    }

    /// Returns once somebody asked that the run end, or revoked it.
    pub async fn until_stopped(&self, run: &RunId) {
        self.until(|| self.is_cancelled(run) || self.is_revoked(run)).await;
    }

    async fn until(&self, wanted: impl Fn() -> bool) {
        let mut changed = self.place.changed.subscribe();
        while !wanted() {
            // Fails only when the sender is gone, which `self` holds.
            let _ = changed.changed().await;
        }
    }

    fn change(&self, run: &RunId, change: impl FnOnce(&mut Run)) {
        change(self.runs().entry(run.clone()).or_default());
        self.place.changed.send_replace(());
    }

    fn runs(&self) -> MutexGuard<'_, HashMap<RunId, Run>> {
        self.place.runs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read_now(&self, run: &RunId, from: usize, max: usize) -> Result<Option<Output>, EngineError> {
        let runs = self.runs();
        let run = runs.get(run).filter(|run| run.there).ok_or(EngineError::Gone)?;
        let rest = run.output.get(from..).unwrap_or_default();
        let bytes = Bytes::copy_from_slice(rest.get(..max).unwrap_or(rest));
        let end = run.ended.is_some() && bytes.len() == rest.len();
        let something = end || !bytes.is_empty();
        Ok(something.then(|| Output { bytes, from: at(from), end }))
    }
}

fn at(position: usize) -> Cursor {
    Cursor::new(position.to_string())
}

/// The beginning has the empty cursor.
fn position(cursor: &Cursor) -> usize {
    cursor.as_str().parse().unwrap_or(0)
}

#[async_trait]
impl Engine for FakeEngine {
    fn name(&self) -> &'static str {
        "fake"
    }

    fn records_before_put(&self) -> bool {
        true
    }

    async fn start(&self, spec: &RunSpec, _secrets: &RunSecrets) -> Result<Handle, EngineError> {
        self.act(&spec.run, "start");
        self.change(&spec.run, |run| run.asked += 1);
        let mut starts = self.place.starts.subscribe();
        let starts = starts.wait_for(|starts| !matches!(starts, Starts::Held)).await;
        if let Ok(Starts::Refused(why)) = starts.as_deref() {
            return Err(EngineError::Unavailable(why.clone()));
        }
        let mut runs = self.runs();
        let run = runs.entry(spec.run.clone()).or_default();
        if run.revoked {
            return Err(EngineError::Revoked);
        }
        run.there = true;
        drop(runs);
        self.place.changed.send_replace(());
        Ok(Handle::new(format!("fake {}", spec.run)))
    }

    async fn observe(&self, run: &RunId) -> Result<Observed, EngineError> {
        Ok(match self.runs().get(run).filter(|run| run.there) {
            None => Observed::Absent,
            Some(Run { ended: Some(ended), .. }) => Observed::Ended(ended.clone()),
            Some(_) => Observed::Running(Handle::new(format!("fake {run}"))),
        })
    }

    async fn ended(&self, run: &RunId, _handle: &Handle) -> Result<Ended, EngineError> {
        let mut changed = self.place.changed.subscribe();
        tokio::time::sleep(ANSWER).await;
        loop {
            let ended = self.runs().get(run).ok_or(EngineError::Gone)?.ended.clone();
            match ended {
                Some(ended) => return Ok(ended),
                // Fails only when the sender is gone, which `self` holds.
                None => changed.changed().await.map_err(|_| EngineError::Gone)?,
            }
        }
    }

    async fn cancel(&self, run: &RunId) -> Result<(), EngineError> {
        self.act(run, "cancel");
        self.change(run, |run| run.cancelled = true);
        Ok(())
    }

    async fn revoke(&self, run: &RunId) -> Result<(), EngineError> {
        self.act(run, "revoke");
        self.change(run, |run| run.revoked = true);
        Ok(())
    }

    async fn remove(&self, run: &RunId) -> Result<(), EngineError> {
        self.act(run, "remove");
        // Fails only when the sender is gone, which `self` holds.
        let _ = self.place.kept.subscribe().wait_for(|kept| kept.as_ref() != Some(run)).await;
        // What was removed is over: nobody starts it again.
        self.change(run, |run| {
            run.revoked |= run.there;
            run.there = false;
        });
        Ok(())
    }

    async fn read(&self, run: &RunId, from: &Cursor, max: usize) -> Result<Output, EngineError> {
        let mut changed = self.place.changed.subscribe();
        let from = position(from);
        let read = async {
            loop {
                if let Some(output) = self.read_now(run, from, max)? {
                    return Ok(output);
                }
                changed.changed().await.map_err(|_| EngineError::Gone)?;
            }
        };
        match tokio::time::timeout(WAIT, read).await {
            Ok(output) => output,
            Err(_) => Ok(Output { bytes: Bytes::new(), from: at(from), end: false }),
        }
    }

    fn advance(&self, from: &Cursor, bytes: &[u8]) -> Cursor {
        at(position(from) + bytes.len())
    }
}
