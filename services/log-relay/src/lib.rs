//! The log-relay: brings what builders write into the log stream, masked, complete, each byte once.
//!
//! - *I am asked* nothing: I look at the journal's builds, and at those that aren't cleaned up yet.
//! - *I ask* the engine for the output of each attempt, and the secrets bucket what to mask.
//! - *I tell* the log stream every byte and the log's end, and each running step, at most two a second.
//! - *I never* write a raw byte while I can't open the build's secrets, nor a byte of a log that I have not claimed;
//!   I never decide anything about a build.
//!
//! Secrets of fewer than 6 bytes are not masked: masking `a` would mask everything.

mod config;
mod held;
mod metrics;
mod output;
mod relay;
mod relays;
mod source;

use std::sync::Arc;

use anyhow::Context as _;
use kiln_bus::holders::{Holders, Member};
use kiln_bus::journal::Journal;
use kiln_bus::logs::Logs;
use kiln_bus::seal::OpenKey;
use kiln_bus::secrets::SecretsBucket;
use kiln_bus::view::View;
use kiln_bus::{Bus, Lease};
use kiln_domain::engine::Engine;
use prometheus_client::registry::Registry;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use crate::config::Config;
use crate::metrics::Metrics;
use crate::relay::Shared;
use crate::relays::Relays;

/// The role's name: of its lease, and of its connection.
pub const ROLE: &str = "log-relay";

/// Finished builds in its view: their logs are mostly complete, and of the others the secrets bucket tells.
const FINISHED_KEPT: usize = 2_000;

/// What a log-relay is given.
pub struct Parts {
    /// Provisioned.
    pub bus: Bus,
    pub engine: Arc<dyn Engine>,
    pub open_key: OpenKey,
    /// See [`Member`].
    pub life: String,
    pub lease: Lease,
    /// Gets the log-relay's metrics.
    pub metrics: Registry,
}

/// Runs until `stop`; then ends its lease, so that another goes on with its logs at once. `ready` is called once it
/// knows all builds, with what is counted.
pub async fn run(
    config: Config,
    parts: Parts,
    ready: impl FnOnce(Registry) + Send,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let problems = config.problems();
    anyhow::ensure!(problems.is_empty(), "the log-relay's configuration is wrong: {}", problems.join("; "));
    let Parts { bus, engine, open_key, life, lease, metrics: mut registry } = parts;
    let metrics = Metrics::register(&mut registry, config.max_log_bytes);
    let (tasks, ended) = (TaskTracker::new(), CancellationToken::new());
    // Also where what follows fails.
    let _guard = ended.clone().drop_guard();
    let view = View::start(&bus, FINISHED_KEPT, &tasks, &ended);
    let host = engine.host().context("learn which host the builders are bound to")?;
    let seal_key = open_key.seal_key();
    let member = Member { role: ROLE, life: &life, host: host.as_deref(), seal_key: Some(&seal_key) };
    let journal = Journal::open(&bus).await.context("open the journal")?;
    let secrets = SecretsBucket::open(&bus).await.context("open the secrets")?;
    // Last: what fails before it leaves no lease that somebody would wait for.
    let holders = Holders::start(&bus, member, lease, &tasks).await.context("take a lease")?;
    let logs = Logs::new(&bus);
    let shared =
        Arc::new(Shared { config, logs, secrets, engine, open_key, holders: holders.clone(), metrics });
    if stop.run_until_cancelled(view.caught_up()).await.is_some() {
        ready(registry);
        Relays::new(shared, view, journal).run(&stop).await;
    }
    holders.release().await;
    ended.cancel();
    tasks.close();
    tasks.wait().await;
    Ok(())
}
