//! The resolver: says what an image reference or a git revision is right now.
//!
//! - *I am asked* for the digest of an image, for the commit of a git revision, and what lies at a reference of this
//!   installation.
//! - *I ask* registries, their mirrors first, through the port of `kiln-registry`, and git remotes, through the real `git`.
//! - *I tell* the other resolvers my answers, in `KILN_REFS`, and the metrics.
//! - *I never* give an answer that was made with credentials to who shows others, put a credential where another process
//!   can see it, or ask a registry that wants to be left alone.

mod cache;
mod commits;
mod complaint;
mod config;
mod git;
mod handlers;
mod images;
mod keys;
mod metrics;
mod pause;
mod turns;

use std::sync::Arc;

use anyhow::Context as _;
use futures::StreamExt as _;
use kiln_bus::Bus;
use kiln_bus::refs::RefsBucket;
use kiln_bus::seal::OpenKey;
use kiln_bus::serve::Server;
use kiln_credentials::Installation;
use kiln_domain::registries::Registries;
use prometheus_client::registry::Registry as MetricsRegistry;
use tokio_util::sync::CancellationToken;

use crate::cache::Answers;
use crate::commits::Commits;
pub use crate::config::Config;
use crate::handlers::Duties;
use crate::images::{Asked, Images};
use crate::keys::Keys;
use crate::metrics::Metrics;

/// The role's name.
pub const ROLE: &str = "resolver";

/// What a resolver is given.
pub struct Parts {
    /// Provisioned.
    pub bus: Bus,
    pub registry: Arc<dyn kiln_registry::Registry>,
    /// Which have mirrors.
    pub registries: Registries,
    /// The credentials of this installation.
    pub installation: Arc<Installation>,
    pub open_key: OpenKey,
    pub metrics: MetricsRegistry,
}

/// Answers until `stop`, then answers what was asked before it. `ready` is called once questions are answered, with what
/// is counted. Errors name what is wrong with the configuration, or what of the bus isn't there.
pub async fn run(
    config: Config,
    parts: Parts,
    ready: impl FnOnce(MetricsRegistry) + Send,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let problems = config.problems();
    anyhow::ensure!(problems.is_empty(), "the resolver's configuration is wrong: {}", problems.join("; "));
    let Parts { bus, registry, registries, installation, open_key, metrics: mut counted } = parts;
    let keys = Keys::new(&open_key).context("make the key of cached answers")?;
    let metrics = Metrics::register(&mut counted);
    let answers = Answers::new(config.cached_images, RefsBucket::open(&bus).await?);
    let duties = Arc::new(Duties {
        open_key,
        installation: installation.clone(),
        images: Images::new(
            &config,
            Asked { registry, registries, installation, answers },
            keys.clone(),
            metrics.clone(),
        ),
        commits: Commits::new(&config, keys, metrics),
    });
    let server = Server::start(&bus, ROLE, &mut counted).await.context("serve")?;
    handlers::serve(&server, &duties).await.context("serve")?;
    let made = kiln_bus::journal::successes(&bus).await?;
    ready(counted);
    let hears = made.for_each(|record| {
        duties.images.made(vec![record.base_ref, record.target_ref]);
        std::future::ready(())
    });
    stop.run_until_cancelled(hears).await;
    stop.cancelled().await;
    server.drain().await;
    Ok(())
}
