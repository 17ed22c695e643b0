//! The end of a process: the first SIGTERM or SIGINT asks, the second ends it at once; what still runs is waited
//! for, but not for ever.

use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

const SAME_SIGNAL: Duration = Duration::from_secs(1);

/// Listens for signals as long as it is kept.
#[derive(Debug)]
pub struct Signals {
    _listener: JoinSet<()>,
}

impl Signals {
    /// Cancels `stop` at the first SIGTERM or SIGINT, and exits with status 130 at the second. What comes within a
    /// second of the first is the first: coreutils' `timeout`, for one, signals a process and then its whole group.
    /// An error means that this process may not handle signals.
    pub fn listen(stop: CancellationToken) -> std::io::Result<Self> {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut listener = JoinSet::new();
        listener.spawn(async move {
            let name = received(&mut terminate, &mut interrupt).await;
            tracing::info!("{name}: stopping; a second signal ends this process at once");
            stop.cancel();
            let first = Instant::now();
            let mut name = received(&mut terminate, &mut interrupt).await;
            while first.elapsed() < SAME_SIGNAL {
                name = received(&mut terminate, &mut interrupt).await;
            }
            tracing::warn!("{name} again: ending at once");
            std::process::exit(130);
        });
        Ok(Self { _listener: listener })
    }
}

async fn received(terminate: &mut Signal, interrupt: &mut Signal) -> &'static str {
    tokio::select! {
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
    }
}

/// Tasks that did not end in time.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{tasks} tasks did not end within {} s", within.as_secs())]
pub struct Unfinished {
    pub tasks: usize,
    pub within: Duration,
}

/// Closes the tracker and waits for its tasks.
pub async fn drain(tasks: &TaskTracker, within: Duration) -> Result<(), Unfinished> {
    tasks.close();
    tokio::time::timeout(within, tasks.wait())
        .await
        .map_err(|_elapsed| Unfinished { tasks: tasks.len(), within })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_drain_waits_but_not_for_ever() {
        let tasks = TaskTracker::new();
        let stop = CancellationToken::new();
        let until = stop.clone();
        tasks.spawn(async move { until.cancelled().await });
        assert_eq!(
            drain(&tasks, Duration::from_millis(1)).await,
            Err(Unfinished { tasks: 1, within: Duration::from_millis(1) })
        );
        stop.cancel();
        assert_eq!(drain(&tasks, Duration::from_secs(10)).await, Ok(()));
    }
}
