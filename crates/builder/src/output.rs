//! The run's output: what the builder and its children write, unchanged, with the steps read from it on the way.

use std::io::Write;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use jiff::Timestamp;
use kiln_domain::step::{Step, StepTimes};
use tokio_util::sync::CancellationToken;

/// Writes to standard output, and remembers the steps that went by. A clone is the same output.
#[derive(Clone, Default)]
pub(crate) struct Output {
    steps: Arc<Mutex<Steps>>,
    trouble: Arc<Mutex<Option<String>>>,
    broken: CancellationToken,
}

#[derive(Default)]
struct Steps {
    running: StepTimes,
    done: Vec<Step>,
    failed: Option<Step>,
}

impl Output {
    /// A line of the builder's own.
    pub(crate) fn say(&self, line: &str) {
        self.write(format!("kiln: {line}\n").as_bytes());
    }

    /// A piece of a child's output.
    pub(crate) fn write(&self, piece: &[u8]) {
        if self.broken.is_cancelled() {
            return;
        }
        let mut stdout = std::io::stdout().lock();
        if let Err(error) = stdout.write_all(piece).and_then(|()| stdout.flush()) {
            *lock(&self.trouble) = Some(error.to_string());
            self.broken.cancel();
        }
    }

    /// Waits until the output can't be written any more, and says why.
    pub(crate) async fn broken(&self) -> String {
        self.broken.cancelled().await;
        lock(&self.trouble).clone().unwrap_or_default()
    }

    /// Looks for steps in a piece of the build tool's output, which came now.
    pub(crate) fn note_steps(&self, piece: &[u8]) {
        lock(&self.steps).running.push(piece, now());
    }

    /// Forgets the steps: the build tool begins anew.
    pub(crate) fn restart_steps(&self) {
        *lock(&self.steps) = Steps::default();
    }

    /// The build tool has ended, and with it the last step.
    pub(crate) fn end_steps(&self) {
        let mut steps = lock(&self.steps);
        if let Some(failed) = steps.running.failed().cloned() {
            steps.failed.get_or_insert(failed);
        }
        let ended = std::mem::take(&mut steps.running).finish(now());
        steps.done.extend(ended);
    }

    /// The step that runs now, or ran last.
    pub(crate) fn last_step(&self) -> Option<Step> {
        let steps = lock(&self.steps);
        steps.running.current().or(steps.done.last()).cloned()
    }

    /// The step that the build tool said to have failed.
    pub(crate) fn failed_step(&self) -> Option<Step> {
        lock(&self.steps).failed.clone()
    }

    /// All steps, the running one ended now.
    pub(crate) fn steps(&self) -> Vec<Step> {
        self.end_steps();
        lock(&self.steps).done.clone()
    }
}

#[expect(clippy::disallowed_methods, reason = "step times are read where the output passes by")]
fn now() -> Timestamp {
    Timestamp::now()
}

/// A poisoned lock's content is still whole here: each change of it is one assignment.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
