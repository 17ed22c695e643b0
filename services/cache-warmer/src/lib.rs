//! The cache-warmer: sees to it that the resolver answers from its cache for a list of images, and for those that builds
//! used most of late.
//!
//! - *I am asked* which images are kept warm.
//! - *I hear* from the journal which images builds used.
//! - *I ask* the resolver for each image, and to refresh an answer that is about to become too old.
//! - *I tell* the metrics how old each answer is, and how often there was none.
//! - *I have* the images pulled into the store of this host's builds, where there is one.
//! - *I give up* the layers that builds left in a registry, where they are old or too many.
//! - *I never* speak to a registry myself. Any number of me may run: whoever finds an answer too old refreshes it, and the others
//!   find it young.

mod budget;
mod choice;
mod config;
mod layers;
mod metrics;
mod shelf;
mod store;
mod used;
mod warm;

use std::sync::Arc;

use anyhow::Context as _;
use kiln_bus::Bus;
use kiln_bus::serve::Server;
use kiln_bus::view::View;
use kiln_contract::cache_warmer::ListWarm;
use prometheus_client::registry::Registry;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::budget::Budget;
use crate::choice::{BUILDS_LOOKED_AT, Choice};
pub use crate::config::Config;
pub use crate::layers::{CachedLayers, LayerCaches};
use crate::metrics::Metrics;
use crate::shelf::Shelf;
use crate::store::Stock;
pub use crate::store::{Store, StoreError};
use crate::warm::Means;

/// The role's name.
pub const ROLE: &str = "cache-warmer";

/// What a cache-warmer is given.
pub struct Parts {
    pub bus: Bus,
    pub metrics: Registry,
    /// The store of this host's builds, if images are to be pulled into it.
    pub store: Option<Arc<dyn Store>>,
    /// Where builds leave their layers, if that is to be looked after.
    pub layers: Option<Arc<dyn LayerCaches>>,
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
    let Parts { bus, metrics: mut counted, store, layers } = parts;
    let means = Means {
        metrics: Metrics::register(&mut counted),
        shelf: Shelf::default(),
        budget: Budget::new(config.refreshes_per_minute),
        bus: bus.clone(),
    };
    let (tasks, ended) = (TaskTracker::new(), CancellationToken::new());
    let view = View::start(&bus, BUILDS_LOOKED_AT, &tasks, &ended);
    let server = Server::start(&bus, ROLE, &mut counted).await.context("serve")?;
    let shelf = means.shelf.clone();
    server.answer(move |_: ListWarm| std::future::ready(Ok(shelf.list()))).await.context("serve")?;
    ready(counted);
    if let Some(store) = store.filter(|_| config.pull_bytes > 0) {
        let stock = Stock::new(store, &means, config.pull_bytes);
        tasks.spawn(ended.clone().run_until_cancelled_owned(stock.keep(config.interval())));
    }
    if let Some(layers) = layers {
        let sweeping = layers::keep_in_bounds(layers, config.clone(), means.metrics.clone());
        tasks.spawn(ended.clone().run_until_cancelled_owned(sweeping));
    }
    Choice::new(&config, &means).keep(&view, &stop).await;
    server.drain().await;
    ended.cancel();
    tasks.close();
    tasks.wait().await;
    Ok(())
}
