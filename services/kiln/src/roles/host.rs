//! What the roles of one process share: health and metrics, and a connection to the bus for each.

use std::time::Duration;

use anyhow::Context as _;
use kiln_bus::keeper::{Keeper, Takes};
use kiln_bus::{Bus, Troubles};
use kiln_chassis::health::{Readiness, serve_health, serve_metrics};
use kiln_chassis::shutdown::drain;
use kiln_chassis::telemetry::Metrics;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::config::{Config, Role};

const LOOK: Duration = Duration::from_millis(500);
/// How long the bus may take to answer.
const ANSWER: Duration = Duration::from_secs(2);
const GRACE: Duration = Duration::from_secs(5);

/// A process that plays one role or more.
#[derive(Debug)]
pub(crate) struct Host {
    /// Names this process where the next will know that it is over; else empty.
    life: String,
    readiness: Readiness,
    metrics: Metrics,
    tasks: TaskTracker,
    /// Not the roles' token: health is answered until the last of them has ended.
    ended: CancellationToken,
    /// What its roles meet on the bus, for its keeper to tell.
    troubles: Troubles,
}

impl Host {
    /// Answers health and metrics from now on. Ready is the process once each of `roles` is. `life` is what its leases
    /// are marked with; empty where nobody will know that it is over.
    pub(crate) fn start(health: TcpListener, metrics: TcpListener, roles: &[Role], life: String) -> Self {
        let host = Self {
            life,
            readiness: Readiness::new(roles.iter().map(|role| name(*role))),
            metrics: Metrics::new(env!("CARGO_PKG_VERSION")),
            tasks: TaskTracker::new(),
            ended: CancellationToken::new(),
            troubles: Troubles::default(),
        };
        host.keep("health", serve_health(health, host.readiness.clone(), host.ended.clone()));
        host.keep("metrics", serve_metrics(metrics, host.metrics.clone(), host.ended.clone()));
        host
    }

    fn keep(&self, what: &'static str, serving: impl Future<Output = std::io::Result<()>> + Send + 'static) {
        self.tasks.spawn(async move {
            if let Err(error) = serving.await {
                tracing::error!("{what} is no longer served: {error}");
            }
        });
    }

    /// Makes the streams and buckets, or brings them up to date; ends the leases of a `former` life that is known
    /// to be over; and looks after the streams from now on: whether what is written is taken is the answer.
    pub(crate) async fn provision(&self, config: &Config, former: Option<&str>) -> anyhow::Result<Takes> {
        let bus = config.connect("keeper")?.connect().await?.with_troubles(&self.troubles);
        let layout = config.layout();
        let provision = async {
            bus.provision(&layout).await?;
            match former {
                Some(life) => bus.end_leases(life).await,
                None => Ok(()),
            }
        };
        if let Err(error) = provision.await {
            bus.close().await;
            return Err(error.into());
        }
        let mut registry = Metrics::part("bus");
        let keeper = Keeper::new(&bus, &layout, &mut registry);
        self.metrics.add(registry);
        let takes = keeper.takes();
        let ended = self.ended.clone();
        self.tasks.spawn(async move {
            ended.run_until_cancelled(keeper.keep()).await;
            bus.close().await;
        });
        Ok(takes)
    }

    /// What the process's leases are marked with.
    pub(crate) fn life(&self) -> &str {
        &self.life
    }

    /// A role's own connection.
    pub(crate) async fn connect(&self, config: &Config, role: &str) -> anyhow::Result<Bus> {
        let bus =
            config.connect(role)?.connect().await.with_context(|| format!("the {role}'s connection"))?;
        Ok(bus.with_troubles(&self.troubles))
    }

    /// An empty registry for what a role counts.
    pub(crate) fn registry(&self, role: &str) -> Registry {
        Metrics::part(role)
    }

    /// The role answers: from now on it is ready while its connection stands, and its metrics are shown.
    pub(crate) fn ready(&self, role: Role, bus: &Bus, metrics: Registry) {
        self.metrics.add(metrics);
        let (bus, readiness, ended) = (bus.clone(), self.readiness.clone(), self.ended.clone());
        self.tasks.spawn(async move {
            loop {
                let state = match bus.is_connected() {
                    true if bus.answers(ANSWER).await => Ok(()),
                    true => Err("the bus does not answer".to_owned()),
                    false => Err("not connected to the bus".to_owned()),
                };
                readiness.set(name(role), state);
                if tokio::time::timeout(LOOK, ended.cancelled()).await.is_ok() {
                    return;
                }
            }
        });
    }

    /// Returns once every role is ready.
    pub(crate) async fn all_ready(&self) {
        self.readiness.ready().await;
    }

    /// Stops answering health and metrics.
    pub(crate) async fn end(&self) {
        self.ended.cancel();
        if let Err(error) = drain(&self.tasks, GRACE).await {
            tracing::warn!("health and metrics: {error}");
        }
    }
}

fn name(role: Role) -> &'static str {
    match role {
        Role::Gateway => kiln_gateway::ROLE,
        Role::Resolver => kiln_resolver::ROLE,
        Role::Orchestrator => kiln_orchestrator::ROLE,
        Role::LogRelay => kiln_log_relay::ROLE,
        Role::CacheWarmer => kiln_cache_warmer::ROLE,
    }
}
