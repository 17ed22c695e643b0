//! A gateway, its client, and the services behind it as the test plays them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result};
use kiln_bus::journal::{Entry, Journal};
use kiln_bus::keeper::Keeper;
use kiln_bus::layout::Layout;
use kiln_bus::logs::{LogWriter, Logs};
use kiln_bus::seal::OpenKey;
use kiln_bus::seal::SealKey;
use kiln_bus::secrets::seal_accesses;
use kiln_bus::serve::Server;
use kiln_bus::{Bus, Connect};
use kiln_contract::orchestrator::{
    Build, BuildAnswer, Cancel, OutputAccess, OutputAccessAnswer, RecordAt, WorkspaceImage,
    WorkspaceImageAnswer,
};
use kiln_contract::resolver::{ResolveImage, ResolvedImage};
use kiln_contract::secrets::{self, OutputAccesses};
use kiln_domain::id::{BuildId, InstanceId};
use kiln_domain::record::Record;
use kiln_domain::transition::Change;
use kiln_gateway::{Config, Parts};
use kiln_proto::builder::image_builder_client::ImageBuilderClient;
use kiln_proto::kiln_v1::builds_client::BuildsClient;
use kiln_testkit::nats::{self, NatsServer};
use kiln_testkit::records;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;
use tonic::transport::Channel;

/// What the orchestrator tells of each run, which nobody but the client may see.
pub(crate) const OWNER_TOKEN: &str = "a very secret owner token";
pub(crate) const SOON: Duration = Duration::from_secs(30);

pub(crate) struct Desk {
    pub(crate) server: NatsServer,
    pub(crate) client: BuildsClient<Channel>,
    /// Of the old API.
    pub(crate) image_builder: ImageBuilderClient<Channel>,
    pub(crate) journal: Journal,
    pub(crate) logs: Logs,
    pub(crate) by: InstanceId,
    _played: Vec<Server>,
    _stop: DropGuard,
}

impl Desk {
    pub(crate) async fn set() -> Result<Self> {
        let server = nats::run_server().await?;
        let bus = connect(&server).await?;
        let layout = Layout { journal_max_bytes: 64 << 20, logs_max_bytes: 64 << 20, ..Layout::default() };
        bus.provision(&layout).await?;
        let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
        let keeper = Keeper::new(&bus, &layout, &mut Registry::default());
        let takes = keeper.takes();
        tasks.spawn(stop.clone().run_until_cancelled_owned(keeper.keep()));
        let played = vec![play_orchestrator(&bus).await?, play_resolver(&bus).await?];
        let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
        let address = format!("http://{}", listener.local_addr()?);
        let parts = Parts {
            bus: connect(&server).await?,
            seal_key: OpenKey::from_seed(OpenKey::new_seed()?)?.seal_key(),
            listener,
            metrics: Registry::default(),
            takes,
        };
        let (is_ready, ready) = tokio::sync::oneshot::channel();
        let running = stop.clone();
        tasks.spawn(async move {
            let ready = |_| is_ready.send(()).unwrap_or_default();
            kiln_gateway::run(Config::default(), parts, ready, running).await.unwrap();
        });
        tokio::time::timeout(SOON, ready).await.context("the gateway is not ready")??;
        Ok(Self {
            client: BuildsClient::connect(address.clone()).await?,
            image_builder: ImageBuilderClient::connect(address).await?,
            journal: Journal::open(&bus).await?,
            logs: Logs::new(&bus),
            by: InstanceId::new("orchestrator", 1)?,
            server,
            _played: played,
            _stop: stop.drop_guard(),
        })
    }

    /// The build that the played orchestrator answers with, accepted.
    pub(crate) async fn asked(&self) -> Result<Entry> {
        let record = asked()?;
        Ok(self.journal.append(None, &Change::Queued(Box::new(record)), &self.by).await?)
    }

    /// A build that was accepted.
    pub(crate) async fn queued(&self, n: u8) -> Result<Entry> {
        let record = records::queued(&format!("i{n}"), [n; 10])?;
        Ok(self.journal.append(None, &Change::Queued(Box::new(record)), &self.by).await?)
    }

    /// A change of a build, tried until the bus takes it.
    pub(crate) async fn change(&self, tail: &Entry, change: Change) -> Result<Entry> {
        let append = async {
            loop {
                match self.journal.append(Some(tail), &change, &self.by).await {
                    Ok(entry) => return entry,
                    Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
                }
            }
        };
        Ok(tokio::time::timeout(SOON, append).await?)
    }

    /// The writer of a build's log.
    pub(crate) async fn writer(&self, id: &BuildId) -> Result<LogWriter> {
        Ok(self.logs.claim(id, &self.by, None).await?)
    }
}

async fn connect(server: &NatsServer) -> Result<Bus> {
    let connect = Connect { url: server.url(), user: None, password: None, name: "test".into() };
    Ok(connect.connect().await?)
}

async fn play_orchestrator(bus: &Bus) -> Result<Server> {
    let server = Server::start(bus, "orchestrator", &mut Registry::default()).await?;
    let answer = || RecordAt::new(&asked().unwrap(), 1);
    server
        .answer(move |_: Build| async move {
            Ok(BuildAnswer { build: Some(answer()?), ..BuildAnswer::default() })
        })
        .await?;
    server.answer(move |_: Cancel| async move { answer() }).await?;
    server.answer(|_: WorkspaceImage| async { Ok(WorkspaceImageAnswer::default()) }).await?;
    let questions = Arc::new(AtomicU32::new(0));
    server
        .answer(move |question: OutputAccess| {
            let is_first = questions.fetch_add(1, Ordering::SeqCst) == 0;
            async move { Ok(access(question, is_first)) }
        })
        .await?;
    Ok(server)
}

fn asked() -> Result<Record> {
    records::queued("asked", [50; 10])
}

/// Every run has a supervisor, and somebody else builds too; the first time nothing is known yet.
fn access(question: OutputAccess, is_first: bool) -> OutputAccessAnswer {
    let output = secrets::OutputAccess {
        url: "https://w.test".into(),
        headers: [("x-gitpod-owner-token".to_owned(), OWNER_TOKEN.to_owned())].into(),
    };
    let mut accesses = OutputAccesses::default();
    if question.others {
        let output = Some(output.clone());
        accesses.others.push(secrets::OthersBuild { id: "theirs".into(), output, ..Default::default() });
    }
    let mut not_yet = Vec::new();
    if is_first {
        not_yet = question.runs;
    } else {
        accesses.runs = question.runs.into_iter().map(|run| (run, output.clone())).collect();
    }
    let key = SealKey::from_public(&question.seal_to).unwrap();
    OutputAccessAnswer { sealed: seal_accesses(&key, &accesses).unwrap(), not_yet }
}

/// It numbers its answers; those about `fresh` may be given again.
async fn play_resolver(bus: &Bus) -> Result<Server> {
    let server = Server::start(bus, "resolver", &mut Registry::default()).await?;
    let count = AtomicU64::new(0);
    server
        .answer(move |question: ResolveImage| {
            let number = count.fetch_add(1, Ordering::Relaxed);
            let fresh_for_ms = if question.reference.contains("/fresh:") { 60_000 } else { 0 };
            let name = question.reference.split_once(':').map_or("", |(name, _)| name);
            let reference = format!("{name}@sha256:{number:064x}");
            std::future::ready(Ok(ResolvedImage { reference, fresh_for_ms, ..Default::default() }))
        })
        .await?;
    Ok(server)
}
