//! Asking other services: not at all where it is known already that no answer can come.

use std::time::Duration;

use kiln_bus::Bus;
use kiln_bus::keeper::Takes;
use kiln_contract::error::Refusal;
use kiln_contract::question::Question;

use crate::presence::Presence;

/// Asks on behalf of callers; clones share what is known.
#[derive(Clone)]
pub(crate) struct Asker {
    pub(crate) bus: Bus,
    pub(crate) presence: Presence,
    pub(crate) takes: Takes,
}

impl Asker {
    /// The answer, or UNAVAILABLE at once while the bus is known to hang.
    pub(crate) async fn ask<Q: Question>(
        &self,
        question: &Q,
        within: Duration,
    ) -> Result<Q::Answer, Refusal> {
        self.presence.check_for_question().await?;
        self.bus.ask(question, within).await
    }

    /// Of a question that who is asked answers only once something is written: UNAVAILABLE at once, too, while the bus
    /// takes nothing.
    pub(crate) async fn ask_to_write<Q: Question>(
        &self,
        question: &Q,
        within: Duration,
    ) -> Result<Q::Answer, Refusal> {
        self.takes.check("ask for a change")?;
        self.ask(question, within).await
    }
}
