//! What makes a builder stop before its work is done.

use std::time::Duration;

use kiln_domain::failure::{Failure, FailureReason};
use kiln_domain::step::Step;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::{Instant, sleep, sleep_until};

use crate::folder::Folder;
use crate::output::Output;

/// How often the folder is looked at.
const LOOK: Duration = Duration::from_millis(100);
/// How much later than its children a builder may get a signal that goes to all of them.
const SIGNAL_LAG: Duration = Duration::from_millis(250);

/// Why the work was stopped.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    Deadline,
    Cancelled,
    Revoked,
    /// Asked to end by a signal.
    Terminated,
    /// What the build tool works with is gone.
    Lost(String),
    /// The output can't be written any more.
    Output(String),
}

/// Listens for what may stop a builder.
pub(crate) struct Stops {
    terminate: Signal,
    interrupt: Signal,
}

impl Stops {
    pub(crate) fn new() -> std::io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    /// Waits until the builder has to stop.
    pub(crate) async fn wait(&mut self, folder: &Folder, deadline: Instant, output: &Output) -> Stop {
        tokio::select! {
            () = sleep_until(deadline) => Stop::Deadline,
            stop = asked_in(folder) => stop,
            _ = self.terminate.recv() => Stop::Terminated,
            _ = self.interrupt.recv() => Stop::Terminated,
            trouble = output.broken() => Stop::Output(trouble),
        }
    }

    /// Whether a failure of the work is owed to what ends the builder too: who stops a host sends SIGTERM to the tools as
    /// well as to their builder, and the tools may be quicker.
    pub(crate) async fn loss(&mut self, folder: &Folder) -> Option<Stop> {
        if folder.is_revoked() {
            return Some(Stop::Revoked);
        }
        tokio::select! {
            _ = self.terminate.recv() => Some(Stop::Terminated),
            _ = self.interrupt.recv() => Some(Stop::Terminated),
            () = sleep(SIGNAL_LAG) => None,
        }
    }
}

async fn asked_in(folder: &Folder) -> Stop {
    loop {
        if folder.is_revoked() {
            return Stop::Revoked;
        }
        if folder.is_cancelled() {
            return Stop::Cancelled;
        }
        sleep(LOOK).await;
    }
}

impl Stop {
    /// Whether it says nothing of the build: the host goes down, or the run is no longer the build's. Then there is to be
    /// no outcome, so that the run counts as lost and may be followed by another.
    pub(crate) fn is_loss(&self) -> bool {
        matches!(self, Self::Revoked | Self::Terminated | Self::Lost(_))
    }

    /// What is told of it. Of a loss only the log tells; whether a build is *cancelled* is decided by the journal.
    pub(crate) fn failure(&self, timeout: Duration, steps: &[Step]) -> Failure {
        match self {
            Self::Deadline => Failure::took_too_long(timeout, steps, None),
            Self::Cancelled => Failure::asked_to_stop(),
            Self::Revoked => Failure::new(FailureReason::Internal, "the run was revoked"),
            Self::Terminated => Failure::new(FailureReason::Internal, "the builder was told to end"),
            Self::Lost(problem) => Failure::new(FailureReason::EngineLost, problem.clone()),
            Self::Output(trouble) => Failure::new(
                FailureReason::Internal,
                format!("the build's output cannot be written: {trouble}"),
            ),
        }
    }
}
