//! The cache-warmer: sees to it that the resolver answers a list of images from its cache.
//!
//! - *I am asked* nothing.
//! - *I ask* the resolver for each image of the list, and to refresh an answer that is about to become too old.
//! - *I tell* the metrics how old each answer is, and how often there was none.
//! - *I never* speak to a registry. Any number of me may run: whoever finds an answer too old refreshes it, and the others
//!   find it young.

mod config;
mod metrics;
mod warm;

use kiln_bus::Bus;
use prometheus_client::registry::Registry;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use crate::config::Config;
use crate::metrics::Metrics;
use crate::warm::Warm;

/// The role's name.
pub const ROLE: &str = "cache-warmer";

/// What a cache-warmer is given.
pub struct Parts {
    pub bus: Bus,
    pub metrics: Registry,
}

/// Keeps the images warm until `stop`. `ready` is called once it is under way, with what is counted. An error names what is
/// wrong with the configuration, by its key.
pub async fn run(
    config: Config,
    parts: Parts,
    ready: impl FnOnce(Registry) + Send,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let problems = config.problems();
    anyhow::ensure!(
        problems.is_empty(),
        "the cache-warmer's configuration is wrong: {}",
        problems.join("; ")
    );
    let Parts { bus, metrics: mut counted } = parts;
    let (metrics, tasks) = (Metrics::register(&mut counted), TaskTracker::new());
    let count = u32::try_from(config.refs.len()).unwrap_or(u32::MAX);
    for (place, reference) in (0..).zip(&config.refs) {
        let image = Warm::new(&config, reference, &bus, &metrics);
        tasks.spawn(stop.clone().run_until_cancelled_owned(image.keep(place, count)));
    }
    tasks.close();
    ready(counted);
    stop.cancelled().await;
    tasks.wait().await;
    Ok(())
}
