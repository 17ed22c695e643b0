//! A holder's appends: each on the tail that it knows, and decided anew when another came first.

use std::time::Duration;

use kiln_bus::BusError;
use kiln_bus::journal::AppendError;
use kiln_domain::run::Findings;
use kiln_domain::transition::Change;

use crate::holder::{ENGINE_PAUSE, Held, LetGo};

/// How long a process that is asked to end tries to say what it did, and then that it lets go.
const RELEASE_PATIENCE: Duration = Duration::from_secs(5);

impl Held<'_> {
    /// Appends a change of ours, for as long as that takes; but once we are asked to end, only a little longer. `false` if it
    /// came too late: then the tail is another, and all is to be decided anew.
    pub(crate) async fn append(&mut self, change: &Change) -> Result<bool, LetGo> {
        let stop = self.stop;
        let out_of_patience = async {
            stop.cancelled().await;
            tokio::time::sleep(RELEASE_PATIENCE).await;
        };
        tokio::select! {
            appended = self.append_until_it_succeeds(change) => appended,
            () = out_of_patience => Err(LetGo::Asked),
        }
    }

    async fn append_until_it_succeeds(&mut self, change: &Change) -> Result<bool, LetGo> {
        let mut change = change.clone();
        let mut said = false;
        loop {
            // A holder that is asked to end may still append what it did.
            match self.check() {
                Ok(()) | Err(LetGo::Asked) => {}
                lost @ Err(_) => lost?,
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
                            self.check_claim()?;
                            return Ok(false);
                        }
                        Ok(Some(_)) => {
                            // The same tail, and the change is illegal: what is to be done is decided anew, without haste.
                            self.pause(ENGINE_PAUSE).await?;
                            return Ok(false);
                        }
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
                    // Once, not each second: it is tried until it succeeds.
                    if !std::mem::replace(&mut said, true) {
                        tracing::warn!(build.id = %self.record().id, "`{}` can't be appended now, trying on: {error}", change.event());
                    }
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

    /// Appends `retrying`: the claim stays ours while the next attempt waits (see [`Record::not_before`]).
    ///
    /// [`Record::not_before`]: kiln_domain::record::Record::not_before
    pub(crate) async fn retry(&mut self, why: &str) -> Result<(), LetGo> {
        if self.append(&Change::Retrying { by: self.me.clone(), why: why.to_owned() }).await? {
            self.shared.metrics.retried();
        }
        Ok(())
    }

    /// Lets go of the build, so that another may claim it. `why` if the engine doesn't start its builder.
    pub(crate) async fn release(&mut self, why: Option<String>) {
        if self.record().state.is_terminal() {
            return;
        }
        let id = self.record().id.clone();
        let change = Change::Released { by: self.me.clone(), why };
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
