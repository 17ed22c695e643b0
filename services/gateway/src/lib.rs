//! The gateway: the public API. It only translates between gRPC, or HTTP for logs, and the bus.
//!
//! - *I am asked* by clients, over gRPC, in our own API and in that of image-builder-mk3: to build, watch, list, cancel,
//!   resolve, and for logs; over HTTP for logs.
//! - *I ask* an orchestrator to build and cancel, and where a build's output is; a resolver to resolve; records and logs I read from the bus myself.
//! - *I tell* nobody anything but my callers.
//! - *I never* decide what becomes of a build, append to a stream, or speak to a registry, a git remote or an engine.

mod ask;
mod builds;
mod compat;
mod config;
mod convert;
mod cut;
mod http;
mod list;
mod log;
mod presence;
mod queue;
mod request;
mod resolved;
mod rpc;
mod status;
mod steps;
mod tls;
mod watch;

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use kiln_bus::Bus;
use kiln_bus::journal::Journal;
use kiln_bus::keeper::Takes;
use kiln_bus::logs::Logs;
use kiln_bus::seal::SealKey;
use kiln_bus::view::View;
use kiln_proto::builder::image_builder_server::ImageBuilderServer;
use kiln_proto::kiln_v1::builds_server::BuildsServer;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::service::Routes;
use tonic::transport::server::TcpIncoming;

use crate::ask::Asker;
use crate::builds::BuildsApi;
use crate::compat::{Handled, ImageBuilderApi};
pub use crate::config::{ClientAuth, Config, TlsConfig};
use crate::cut::Cuts;
use crate::log::BuildLogs;
use crate::presence::Presence;
use crate::queue::Queue;
use crate::resolved::Resolved;
use crate::rpc::Metrics;
use crate::steps::Steps;
use crate::tls::Tls;

/// The role's name, of its connection.
pub const ROLE: &str = "gateway";

/// Of what it counts, but for what mk3's dashboards know.
const PREFIX: &str = "kiln_gateway";

/// Finished builds in its view, which is what is listed.
const FINISHED_KEPT: usize = 20_000;

/// The largest message of the API, either way.
const MESSAGE_BYTES: usize = 16 << 20;

/// What a gateway is given.
pub struct Parts {
    pub bus: Bus,
    pub seal_key: SealKey,
    pub listener: TcpListener,
    /// Without a prefix: some of its metrics have the names that mk3 gave them.
    pub metrics: Registry,
    /// Whether the bus takes what is written.
    pub takes: Takes,
}

/// Serves until `stop`; streams then end with UNAVAILABLE, at which a client resumes elsewhere. `ready` is called once
/// the view has caught up and calls are answered, with what is counted.
pub async fn run(
    config: Config,
    parts: Parts,
    ready: impl FnOnce(Registry) + Send,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let Parts { bus, seal_key, listener, mut metrics, takes } = parts;
    let tls = config.tls.clone().map(Tls::open).transpose().context("`gateway.tls`")?;
    let tasks = TaskTracker::new();
    let ended = CancellationToken::new();
    let view = View::start(&bus, FINISHED_KEPT, &tasks, &ended);
    let logs = Logs::new(&bus);
    let presence = Presence::start(&bus, &tasks, &ended);
    let cuts = Cuts { stop: stop.clone(), presence: presence.clone() };
    let (reporter, health) = tonic_health::server::health_reporter();
    let described = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(kiln_proto::DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let reflection = described().build_v1().context("gRPC reflection")?;
    // Which older clients ask for.
    let reflection_alpha = described().build_v1alpha().context("gRPC reflection")?;
    let journal = Journal::open(&bus).await.context("open the journal")?;
    let steps = Steps::start(&logs, &view, &tasks, &ended);
    let readers = Gauge::default();
    let handled = Handled::register(&mut metrics);
    let own_metrics = metrics.sub_registry_with_prefix(PREFIX);
    own_metrics.register("log_readers", "Reads of logs that go on, over gRPC and HTTP", readers.clone());
    let build_logs = BuildLogs {
        view: view.clone(),
        journal: journal.clone(),
        logs,
        tasks: tasks.clone(),
        cuts: cuts.clone(),
        readers,
    };
    let api = Arc::new(BuildsApi {
        config,
        steps,
        queue: Queue::start(&view, &tasks, &ended),
        journal,
        build_logs: build_logs.clone(),
        cuts,
        asker: Asker { bus, presence: presence.clone(), takes },
        view: view.clone(),
        seal_key,
        resolved: Resolved::register(own_metrics),
        metrics: Metrics::register(own_metrics),
    });
    let image_builder = ImageBuilderApi::new(api.clone(), handled).context("a key for answers")?;
    let image_builder = ImageBuilderServer::new(image_builder)
        .max_decoding_message_size(MESSAGE_BYTES)
        .max_encoding_message_size(MESSAGE_BYTES);
    let builds = BuildsServer::from_arc(api)
        .max_decoding_message_size(MESSAGE_BYTES)
        .max_encoding_message_size(MESSAGE_BYTES);

    // Serving only while the bus can be reached and the view has caught up.
    let watching = ended.clone();
    let watched_view = view.clone();
    tasks.spawn(async move {
        let mut served = None;
        while !watching.is_cancelled() {
            let serving = watched_view.is_caught_up() && presence.is_there();
            if served != Some(serving) {
                served = Some(serving);
                if serving {
                    reporter.set_serving::<BuildsServer<BuildsApi>>().await;
                    reporter.set_serving::<ImageBuilderServer<ImageBuilderApi>>().await;
                    reporter.set_service_status("", tonic_health::ServingStatus::Serving).await;
                } else {
                    reporter.set_not_serving::<BuildsServer<BuildsApi>>().await;
                    reporter.set_not_serving::<ImageBuilderServer<ImageBuilderApi>>().await;
                    reporter.set_service_status("", tonic_health::ServingStatus::NotServing).await;
                }
            }
            tokio::select! {
                () = watching.cancelled() => {}
                () = tokio::time::sleep(Duration::from_millis(500)) => {}
            }
        }
    });
    let services = Routes::new(health)
        .add_service(reflection)
        .add_service(reflection_alpha)
        .add_service(builds)
        .add_service(image_builder);
    let router = tonic::transport::Server::builder()
        .accept_http1(true)
        .http2_keepalive_interval(Some(Duration::from_secs(30)))
        .http2_keepalive_timeout(Some(Duration::from_secs(20)))
        .max_connection_age_grace(Duration::from_secs(5))
        .add_routes(http::routes(services, build_logs, own_metrics));
    let stopped = stop.cancelled();
    let serving = async {
        match tls {
            Some(tls) => router.serve_with_incoming_shutdown(tls.incoming(listener), stopped).await,
            None => {
                let incoming = TcpIncoming::from(listener)
                    .with_nodelay(Some(true))
                    // What HTTP/2's pings are to the others: a peer that is gone without a word is noticed within a minute.
                    .with_keepalive(Some(Duration::from_secs(30)))
                    .with_keepalive_interval(Some(Duration::from_secs(10)))
                    .with_keepalive_retries(Some(3));
                router.serve_with_incoming_shutdown(incoming, stopped).await
            }
        }
    };
    // Health is answered from the beginning; a call that needs the whole view is refused until it is there.
    let announced = ready_once(&view, ready, metrics, &stop);
    let (served, ()) = tokio::join!(serving, announced);
    ended.cancel();
    tasks.close();
    tasks.wait().await;
    served.context("serve gRPC")
}

async fn ready_once(view: &View, ready: impl FnOnce(Registry), metrics: Registry, stop: &CancellationToken) {
    if stop.run_until_cancelled(view.caught_up()).await.is_some() {
        ready(metrics);
    }
}
