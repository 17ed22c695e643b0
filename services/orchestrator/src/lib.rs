//! The orchestrator: decides whether an image is to be built, and sees each build to its end.
//!
//! - *I am asked* to build an image, to cancel a build, and which image a source would make.
//! - *I ask* the resolver what a reference or revision is now, and what lies at a target; the engine to run builders; the
//!   installation's credentials for what a builder may pull and must push; a one-time URL of git credentials, once, where
//!   builders don't do so.
//! - *I tell* the journal every change of a build, and the metrics.
//! - *I never* act on a build without a claim that stands in the journal, nor before its append has succeeded; I never
//!   speak to a registry or a git remote myself.

mod accept;
mod append;
mod cancel;
mod claims;
mod cleanup;
mod conclude;
mod config;
mod credentials;
mod handlers;
mod holder;
mod identity;
pub mod inspect;
mod mask;
mod metrics;
mod one_time;
mod queue;
mod resolver;
mod room;
mod spec;

use std::sync::Arc;

use anyhow::Context as _;
use kiln_bus::holders::{Holders, Member};
use kiln_bus::journal::Journal;
use kiln_bus::seal::OpenKey;
use kiln_bus::secrets::SecretsBucket;
use kiln_bus::serve::Server;
use kiln_bus::view::View;
use kiln_bus::{Bus, Lease, logs::Logs};
use kiln_credentials::Installation;
use kiln_domain::engine::Engine;
use prometheus_client::registry::Registry;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use crate::config::Config;
use crate::metrics::Metrics;
use crate::resolver::Resolver;

/// The role's name: of its lease, and of its connection.
pub const ROLE: &str = "orchestrator";

/// Of what it counts, but for what image-builder-mk3's dashboards know.
pub const PREFIX: &str = "kiln_orchestrator";

/// Finished builds in its view: it acts on none of them, and looks up a few.
const FINISHED_KEPT: usize = 500;

/// What an orchestrator is given.
pub struct Parts {
    pub bus: Bus,
    pub engine: Arc<dyn Engine>,
    /// The credentials of this installation.
    pub installation: Arc<Installation>,
    pub open_key: OpenKey,
    /// See [`Member`].
    pub life: String,
    pub lease: Lease,
    /// Without a prefix: some of its metrics have the names that image-builder-mk3 gave them.
    pub metrics: Registry,
}

/// What its duties share.
struct Shared {
    config: Config,
    journal: Journal,
    view: View,
    holders: Holders,
    secrets: SecretsBucket,
    logs: Logs,
    engine: Arc<dyn Engine>,
    installation: Arc<Installation>,
    open_key: OpenKey,
    resolver: Resolver,
    metrics: Metrics,
}

/// Runs until `stop`; then lets go of every build, so that another may claim it at once, and leaves builders running.
/// `ready` is called once questions are answered, with what is counted.
pub async fn run(
    config: Config,
    parts: Parts,
    ready: impl FnOnce(Registry) + Send,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let Parts { bus, engine, installation, open_key, life, lease, mut metrics } = parts;
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
    let shared = Arc::new(Shared {
        journal,
        secrets,
        logs: Logs::new(&bus),
        resolver: Resolver::new(&bus),
        metrics: Metrics::register(&mut metrics),
        config,
        view,
        holders,
        engine,
        installation,
        open_key,
    });
    if stop.run_until_cancelled(shared.view.caught_up()).await.is_some() {
        let server =
            Server::start(&bus, ROLE, metrics.sub_registry_with_prefix(PREFIX)).await.context("serve")?;
        handlers::serve(&server, &shared).await.context("serve")?;
        ready(metrics);
        let cleaning = stop.run_until_cancelled(cleanup::keep(&shared));
        let looking = stop.run_until_cancelled(room::watch(&shared));
        tokio::join!(claims::keep(&shared, &stop), cleaning, looking);
        server.drain().await;
    }
    shared.holders.release().await;
    ended.cancel();
    tasks.close();
    tasks.wait().await;
    Ok(())
}
