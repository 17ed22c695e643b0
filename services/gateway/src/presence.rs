//! Whether the bus is there. While it is away nothing is answered, not even from memory: that may be old by any time. A
//! stream is kept open for a while, since most often the bus comes back.

use std::time::Duration;

use kiln_bus::{Bus, BusError};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

const LOOK: Duration = Duration::from_millis(250);
/// The server answers within this long, or it is away.
const ANSWER: Duration = Duration::from_secs(1);
/// Away for so long, it is away rather than busy: a question need not find that out by itself.
const HANGS: Duration = Duration::from_secs(1);
/// How long a stream outlives the bus.
const STREAM_PATIENCE: Duration = Duration::from_secs(30);

/// Since when the bus is away; clones share it.
#[derive(Clone)]
pub(crate) struct Presence {
    bus: Bus,
    away: watch::Sender<Option<Instant>>,
}

impl Presence {
    /// Looks after the bus until `stop`.
    pub(crate) fn start(bus: &Bus, tasks: &TaskTracker, stop: &CancellationToken) -> Self {
        let presence = Self { bus: bus.clone(), away: watch::Sender::new(None) };
        let looking = presence.clone();
        let look = async move {
            loop {
                let there = looking.bus.answers(ANSWER).await;
                looking.away.send_if_modified(|away| {
                    let changed = away.is_some() == there;
                    if changed {
                        *away = (!there).then(Instant::now);
                    }
                    changed
                });
                tokio::time::sleep(LOOK).await;
            }
        };
        let stop = stop.clone();
        tasks.spawn(async move { stop.run_until_cancelled(look).await });
        presence
    }

    pub(crate) fn is_there(&self) -> bool {
        self.away.borrow().is_none()
    }

    /// An error while the bus is away.
    pub(crate) async fn check(&self) -> Result<(), BusError> {
        const ANSWER: &str = "answer";
        self.bus.present(ANSWER).await?;
        self.answers(ANSWER, self.is_there(), "the bus does not answer: what this gateway knows may be old")
            .await
    }

    /// An error while the bus hangs. That it is not connected to, a question finds out at once by itself.
    pub(crate) async fn check_for_question(&self) -> Result<(), BusError> {
        let hangs = self.away.borrow().is_some_and(|since| since.elapsed() >= HANGS);
        self.answers("ask", !hangs, "nats-server does not answer").await
    }

    async fn answers(&self, operation: &'static str, known: bool, otherwise: &str) -> Result<(), BusError> {
        // It may have come back since it was looked at last.
        match known || self.bus.answers(LOOK).await {
            true => Ok(()),
            false => Err(BusError::Unavailable { operation, detail: otherwise.to_owned() }),
        }
    }

    /// Returns once the bus has been away for too long for an open stream, and how long that is.
    pub(crate) async fn lost(&self) -> Duration {
        lost(self.away.subscribe()).await
    }
}

async fn lost(mut changes: watch::Receiver<Option<Instant>>) -> Duration {
    loop {
        let away = *changes.borrow_and_update();
        let too_long = async {
            match away {
                Some(since) => tokio::time::sleep_until(since + STREAM_PATIENCE).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = too_long => break,
            // The gateway ends.
            changed = changes.changed() => if changed.is_err() { break },
        }
    }
    STREAM_PATIENCE
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_stream_outlives_a_short_absence_and_not_a_long_one() {
        let away = watch::Sender::new(None);
        let ended = lost(away.subscribe());
        tokio::pin!(ended);
        let mut ends_within =
            async |seconds| tokio::time::timeout(Duration::from_secs(seconds), &mut ended).await.ok();
        assert!(ends_within(3_600).await.is_none());
        away.send_replace(Some(Instant::now()));
        assert!(ends_within(29).await.is_none());
        away.send_replace(None);
        assert!(ends_within(3_600).await.is_none());
        away.send_replace(Some(Instant::now()));
        assert_eq!(ends_within(31).await, Some(STREAM_PATIENCE));
    }
}
