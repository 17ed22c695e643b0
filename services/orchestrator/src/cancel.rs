//! Cancelling: asked of the holder by an event; a build that nobody ever claimed ends at once.

use kiln_bus::journal::{AppendError, Entry};
use kiln_contract::error::{Code, Refusal};
use kiln_domain::id::BuildId;
use kiln_domain::run::Findings;
use kiln_domain::transition::{Change, apply};

use crate::Shared;

impl Shared {
    /// Asks that a build stop. Idempotent: a build that is over, or asked to stop before, is returned as it is.
    pub(crate) async fn cancel(&self, id: &BuildId, reason: &str) -> Result<Entry, Refusal> {
        loop {
            let Some(mut tail) = self.journal.last_of_build(id).await? else {
                return Err(Refusal::new(Code::NotFound, format!("build {id} not found")));
            };
            if tail.record.state.is_terminal() || tail.record.cancel.is_some() && tail.record.claims > 0 {
                return Ok(tail);
            }
            let by = self.appender()?;
            let request = Change::CancelRequested { reason: reason.to_owned() };
            let change = if tail.record.claims == 0 {
                // One event says both: that it was asked for, and that it is done.
                if let Ok(record) = apply(Some(&tail.record), &request) {
                    tail.record = record;
                }
                Change::Cancelled { by: None, findings: Findings::default() }
            } else {
                request
            };
            match self.journal.append(Some(&tail), &change, &by).await {
                Ok(entry) => {
                    if entry.record.state.is_terminal() {
                        self.metrics.ended(&entry);
                    }
                    return Ok(entry);
                }
                Err(AppendError::Lost | AppendError::Gone) => {}
                Err(AppendError::Illegal(error)) => {
                    return Err(Refusal::new(Code::FailedPrecondition, error.to_string()));
                }
                Err(AppendError::Bus(error)) => return Err(error.into()),
            }
        }
    }
}
