//! What is tried again, how soon, and until when.

use std::time::Duration;

use backon::{BackoffBuilder as _, ExponentialBackoff, ExponentialBuilder};
use tokio::time::Instant;

use crate::access::Access;
use crate::error::{Error, Problem};

const FIRST: Duration = Duration::from_millis(100);
const LONGEST: Duration = Duration::from_secs(5);

/// The waits between the attempts of one request.
pub(crate) struct Retry {
    delays: ExponentialBackoff,
    give_up: Instant,
    wait_out_limits: bool,
    /// A refusal counts as passing, too.
    doubts: bool,
}

impl Retry {
    /// For a request that can be asked until the access's patience with that registry ends.
    pub(crate) fn of_request(access: &Access, registry: &str) -> Self {
        let delays = backoff().without_max_times().build();
        Self {
            delays,
            give_up: access.give_up(registry),
            wait_out_limits: access.wait_out_limits,
            doubts: false,
        }
    }

    /// For moving a blob, which may take long before it fails: four more attempts.
    pub(crate) fn of_transfer(access: &Access) -> Self {
        let delays = backoff().with_max_times(4).build();
        Self { delays, give_up: access.deadline, wait_out_limits: access.wait_out_limits, doubts: false }
    }

    /// For a refusal of what is known to be right: four more attempts.
    pub(crate) fn of_doubts(access: &Access) -> Self {
        Self { doubts: true, ..Self::of_transfer(access) }
    }

    /// Waits until it is time for the next attempt; gives the failure back if there is to be none.
    pub(crate) async fn wait(&mut self, failure: Error) -> Result<(), Error> {
        let passing = match &failure {
            Error::Unavailable { problem: Problem::Tls(_), .. } => false,
            Error::Unavailable { .. } => true,
            Error::Limited { .. } => self.wait_out_limits,
            Error::Rejected { .. } => self.doubts,
            _ => false,
        };
        let delay = if passing { self.delays.next() } else { None };
        // Added, not chosen, so that all who were told the same time don't come back at once.
        let delay = delay.map(|delay| delay + failure.retry_after().unwrap_or_default());
        match delay {
            Some(delay) if Instant::now() + delay < self.give_up => {
                tracing::debug!(delay_ms = delay.as_millis(), "{failure}; trying again");
                tokio::time::sleep(delay).await;
                Ok(())
            }
            _ => Err(failure),
        }
    }
}

fn backoff() -> ExponentialBuilder {
    ExponentialBuilder::default().with_min_delay(FIRST).with_max_delay(LONGEST).with_factor(2.0).with_jitter()
}
