//! A holder's appends: each on the tail that it knows, and decided anew when another came first.

use std::time::Duration;

use kiln_bus::BusError;
use kiln_bus::journal::AppendError;
use kiln_domain::run::Findings;
use kiln_domain::transition::Change;

use crate::holder::{ENGINE_PAUSE, Held, LetGo};

/// Before the first restart after a lost builder; each later one waits longer by as much.
const RETRY_PAUSE: Duration = Duration::from_secs(2);

/// How long a process that is asked to end tries to say that it lets go.
const RELEASE_PATIENCE: Duration = Duration::from_secs(5);

impl Held<'_> {
    /// Appends a change of ours. `false` if it came too late: then the tail is another, and all is to be decided anew.
    pub(crate) async fn append(&mut self, change: &Change) -> Result<bool, LetGo> {
        let mut change = change.clone();
        loop {
            // A holder that is asked to end may still append what it did.
            match self.check() {
                Ok(()) | Err(LetGo::Asked) => {}
                lost @ Err(LetGo::Lost | LetGo::Gone) => lost?,
            }
            match self.shared.journal.append(Some(&self.tail), &change, &self.me).await {
                Ok(entry) => {
                    self.tail = entry;
                    return Ok(true);
                }
                Err(AppendError::Lost | AppendError::Gone | AppendError::Illegal(_)) => {
                    let last = self.shared.journal.last_of_build(&self.record().id).await;
                    match last {
                        Ok(Some(last)) if last.sequence > self.tail.sequence => {
                            let joined_only = last.record.cancel == self.record().cancel
                                && last.record.claims == self.record().claims
                                && last.record.attempt == self.record().attempt
                                && last.record.handle == self.record().handle
                                && !last.record.state.is_terminal();
                            self.take(Some(last))?;
                            // Somebody joined: what we were about to say is as true as before.
                            if !joined_only {
                                return Ok(false);
                            }
                        }
                        Ok(None) => return Err(LetGo::Gone),
                        // A stream that was restored goes on from what it held then.
                        Ok(Some(last)) if last.sequence < self.tail.sequence => {
                            self.tail = last;
                            self.take(None)?;
                            return Ok(false);
                        }
                        Ok(Some(_)) => return Ok(false),
                        Err(error) => {
                            tracing::warn!(build.id = %self.record().id, "the journal can't be read now: {error}");
                            tokio::time::sleep(ENGINE_PAUSE).await;
                        }
                    }
                }
                Err(AppendError::Bus(error @ (BusError::Refused { .. } | BusError::Malformed { .. }))) => {
                    tracing::error!(build.id = %self.record().id, "`{}` is refused: {error}", change.event());
                    // What the builder found may be more than the bus takes; the end itself is small.
                    change = without_findings(change);
                    tokio::time::sleep(ENGINE_PAUSE * 5).await;
                }
                Err(AppendError::Bus(error)) => {
                    tracing::warn!(build.id = %self.record().id, "`{}` can't be appended now: {error}", change.event());
                    tokio::time::sleep(ENGINE_PAUSE).await;
                }
            }
        }
    }

    /// Appends the build's end.
    pub(crate) async fn end(&mut self, change: Change) -> Result<(), LetGo> {
        if self.append(&change).await? {
            self.shared.metrics.ended(&self.tail);
        }
        Ok(())
    }

    /// Appends `retrying`, then waits before the next attempt.
    pub(crate) async fn retry(&mut self, why: &str) -> Result<(), LetGo> {
        let pause = RETRY_PAUSE * self.record().attempt;
        if self.append(&Change::Retrying { by: self.me.clone(), why: why.to_owned() }).await? {
            self.shared.metrics.retried();
            self.pause(pause).await?;
        }
        Ok(())
    }

    pub(crate) async fn release(&mut self) {
        if self.record().state.is_terminal() {
            return;
        }
        let id = self.record().id.clone();
        let change = Change::Released { by: self.me.clone() };
        match tokio::time::timeout(RELEASE_PATIENCE, self.append(&change)).await {
            Ok(Ok(_)) => {}
            Ok(Err(_)) => tracing::info!(build.id = %id, "build `{id}` was lost before it could be released"),
            Err(_) => {
                tracing::warn!(build.id = %id, "build `{id}` could not be released: our lease on it will lapse")
            }
        }
    }
}

/// The same end, without what the builder found on its way.
fn without_findings(change: Change) -> Change {
    let findings = Findings::default();
    match change {
        Change::Succeeded { by, digest, .. } => Change::Succeeded { by, digest, findings },
        Change::Failed { by, failure, .. } => Change::Failed { by, failure, findings },
        Change::Cancelled { by, .. } => Change::Cancelled { by, findings },
        other => other,
    }
}
