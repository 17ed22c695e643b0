//! A bus, a gateway on it, and builds whose logs the test writes.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context as _, Result};
use bytes::Bytes;
use kiln_bus::journal::{Entry, Journal};
use kiln_bus::keeper::Keeper;
use kiln_bus::layout::Layout;
use kiln_bus::logs::{LogWriter, Logs, Source};
use kiln_bus::seal::OpenKey;
use kiln_bus::{Bus, Connect};
use kiln_contract::event::Progress;
use kiln_domain::engine::{Cursor, Handle};
use kiln_domain::id::{BuildId, InstanceId};
use kiln_domain::step::Step;
use kiln_domain::transition::Change;
use kiln_gateway::{Config, Parts};
use kiln_proto::kiln_v1::WatchBuildRequest;
use kiln_proto::kiln_v1::builds_client::BuildsClient;
use kiln_testkit::nats::{NatsServer, run_server};
use kiln_testkit::records::queued;
use prometheus_client::registry::Registry;
use reqwest::{Client, RequestBuilder};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;

pub(crate) const LONG: Duration = Duration::from_secs(60);

pub(crate) struct Bed {
    pub(crate) address: SocketAddr,
    pub(crate) stop: CancellationToken,
    client: Client,
    bus: Bus,
    metrics: Arc<Mutex<Registry>>,
    gateway: JoinSet<Result<()>>,
    server: Arc<NatsServer>,
}

/// A build that waits, and the writer of its log.
pub(crate) struct Play {
    pub(crate) id: BuildId,
    journal: Journal,
    entry: Entry,
    writer: Option<LogWriter>,
    logs: Logs,
}

impl Bed {
    pub(crate) async fn new() -> Result<Self> {
        let server = run_server().await?;
        let bus = connect(&server.url()).await?;
        let layout = Layout {
            replicas: 1,
            journal_max_bytes: 64 << 20,
            logs_max_bytes: 256 << 20,
            logs_max_age: Duration::from_secs(3600),
        };
        bus.provision(&layout).await?;
        Self::on(Arc::new(server)).await
    }

    /// Another gateway on the same bus.
    pub(crate) async fn beside(other: &Self) -> Result<Self> {
        Self::on(other.server.clone()).await
    }

    async fn on(server: Arc<NatsServer>) -> Result<Self> {
        let bus = connect(&server.url()).await?;
        let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
        let (address, stop) = (listener.local_addr()?, CancellationToken::new());
        let seal_key = OpenKey::from_seed(OpenKey::new_seed()?)?.seal_key();
        let takes = Keeper::new(&bus, &Layout::default(), &mut Registry::default()).takes();
        let parts = Parts {
            bus: connect(&server.url()).await?,
            seal_key,
            listener,
            metrics: Registry::default(),
            takes,
        };
        let (is_ready, ready) = tokio::sync::oneshot::channel();
        let mut gateway = JoinSet::new();
        let stopped = stop.clone();
        gateway.spawn(async move {
            let ready = |metrics| drop(is_ready.send(metrics));
            kiln_gateway::run(Config::default(), parts, ready, stopped).await
        });
        let metrics = tokio::time::timeout(LONG, ready).await.context("the gateway is not ready")??;
        // reqwest wants a provider even for plain HTTP; it fails only where a test has installed one already.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = Client::builder().no_proxy().build()?;
        let metrics = Arc::new(Mutex::new(metrics));
        Ok(Self { address, stop, client, bus, metrics, gateway, server })
    }

    pub(crate) async fn build(&self, number: u8) -> Result<Play> {
        let journal = Journal::open(&self.bus).await?;
        let record = queued(&format!("image-{number}"), [number; 10])?;
        let (id, by) = (record.id.clone(), InstanceId::new("orchestrator", 1)?);
        let entry = journal.append(None, &Change::Queued(Box::new(record)), &by).await?;
        Ok(Play { id, journal, entry, writer: None, logs: Logs::new(&self.bus) })
    }

    pub(crate) fn get(&self, path: &str) -> RequestBuilder {
        self.client.get(format!("http://{}{path}", self.address))
    }

    pub(crate) fn post(&self, path: &str) -> RequestBuilder {
        self.client.post(format!("http://{}{path}", self.address))
    }

    pub(crate) fn head(&self, path: &str) -> RequestBuilder {
        self.client.head(format!("http://{}{path}", self.address))
    }

    /// Reads of logs that go on.
    pub(crate) fn readers(&self) -> Result<u64> {
        let mut text = String::new();
        let metrics = self.metrics.lock().map_err(|_| anyhow::anyhow!("a test has failed"))?;
        prometheus_client::encoding::text::encode(&mut text, &metrics)?;
        let line = text.lines().find_map(|line| line.strip_prefix("kiln_gateway_log_readers "));
        Ok(line.context("no such metric")?.parse()?)
    }

    /// Waits until so many logs are read.
    pub(crate) async fn until_readers(&self, count: u64) -> Result<()> {
        let waiting = async {
            while self.readers()? != count {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            anyhow::Ok(())
        };
        tokio::time::timeout(LONG, waiting).await.with_context(|| format!("{:?} readers", self.readers()))?
    }

    pub(crate) async fn client(&self) -> Result<BuildsClient<Channel>> {
        Ok(BuildsClient::connect(format!("http://{}", self.address)).await?)
    }

    /// Waits until the gateway's view has a build's end.
    pub(crate) async fn until_over(&self, id: &BuildId) -> Result<()> {
        let mut client = self.client().await?;
        let request = WatchBuildRequest { id: id.to_string() };
        let mut builds = client.watch_build(request).await?.into_inner();
        let over = async {
            // It ends with the terminal record.
            while builds.message().await?.is_some() {}
            anyhow::Ok(())
        };
        tokio::time::timeout(LONG, over).await.context("it is not over")?
    }

    /// Ends the gateway, and waits for it.
    pub(crate) async fn end(mut self) -> Result<()> {
        self.stop.cancel();
        tokio::time::timeout(LONG, self.gateway.join_next())
            .await
            .context("the gateway does not end")?
            .context("no gateway")??
    }
}

impl Play {
    pub(crate) fn path(&self) -> String {
        format!("/v1/builds/{}/log", self.id)
    }

    pub(crate) async fn write(&mut self, bytes: impl Into<Bytes>) -> Result<()> {
        self.append(bytes.into(), false).await
    }

    /// Its builder runs.
    pub(crate) async fn start(&mut self) -> Result<()> {
        let by = InstanceId::new("orchestrator", 1)?;
        self.change(Change::Claimed { by: by.clone() }).await?;
        self.change(Change::Started {
            by,
            handle: Handle::new("a run"),
            engine: "fake".into(),
            build_tool: String::new(),
        })
        .await
    }

    /// Its builder has come to a step.
    pub(crate) async fn step(&self, number: u32, of: u32) -> Result<()> {
        let started_at = jiff::Timestamp::UNIX_EPOCH;
        let name = format!("RUN step-{number}");
        let step = Step { number, of, name, started_at, duration_ms: None, cached: false };
        Ok(self.logs.publish_progress(&self.id, &Progress { attempt: 1, step }).await?)
    }

    /// The build is over, and then its log is complete.
    pub(crate) async fn end(&mut self) -> Result<()> {
        self.cancel().await?;
        self.append(Bytes::new(), true).await
    }

    /// The build is over; of its log nothing is said.
    pub(crate) async fn cancel(&mut self) -> Result<()> {
        self.change(Change::Cancelled { by: None, findings: Default::default() }).await
    }

    async fn change(&mut self, change: Change) -> Result<()> {
        let by = InstanceId::new("orchestrator", 1)?;
        self.entry = self.journal.append(Some(&self.entry), &change, &by).await?;
        Ok(())
    }

    async fn append(&mut self, bytes: Bytes, complete: bool) -> Result<()> {
        if self.writer.is_none() {
            self.writer = Some(self.logs.claim(&self.id, &InstanceId::new("log-relay", 1)?, None).await?);
        }
        let writer = self.writer.as_mut().context("no writer")?;
        let position = writer.end() + bytes.len() as u64;
        let source = Source { attempt: 1, cursor: Cursor::new(position.to_string()) };
        Ok(writer.append(bytes, source, complete).await?)
    }
}

async fn connect(url: &str) -> Result<Bus> {
    let connect = Connect { url: url.into(), user: None, password: None, name: "test".into() };
    Ok(connect.connect().await?)
}
