//! A bus, an engine that the test plays, a journal that the test writes, and relays that can be killed.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use bytes::Bytes;
use futures::StreamExt as _;
use kiln_bus::journal::{Entry, Journal};
use kiln_bus::layout::Layout;
use kiln_bus::logs::{LogTail, Logs, Start, Until};
use kiln_bus::seal::{OpenKey, SealKey};
use kiln_bus::secrets::{SecretsBucket, seal};
use kiln_bus::{Bus, Connect, Lease};
use kiln_contract::secrets::Secrets;
use kiln_domain::id::{BuildId, InstanceId, RunId};
use kiln_domain::transition::Change;
use kiln_log_relay::{Config, Parts};
use kiln_testkit::engine::FakeEngine;
use kiln_testkit::nats::{NatsServer, run_server};
use kiln_testkit::records::queued;
use prometheus_client::registry::Registry;
use secrecy::SecretString;
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;

const LONG: Duration = Duration::from_secs(60);

pub(crate) struct Bed {
    pub(crate) server: NatsServer,
    pub(crate) bus: Bus,
    pub(crate) logs: Logs,
    pub(crate) engine: Arc<FakeEngine>,
    seed: SecretString,
}

/// A relay in a runtime of its own, so that all of it can be killed at once.
pub(crate) struct Relay {
    runtime: Option<Runtime>,
    stop: CancellationToken,
    life: String,
    ended: tokio::sync::oneshot::Receiver<Result<()>>,
}

/// One build, as its orchestrator tells of it.
pub(crate) struct Play {
    pub(crate) id: BuildId,
    journal: Journal,
    tail: Entry,
    by: InstanceId,
    engine: Arc<FakeEngine>,
}

impl Bed {
    pub(crate) async fn new() -> Result<Self> {
        let server = run_server().await?;
        let bus = connect(&server).await?;
        let layout = Layout {
            replicas: 1,
            journal_max_bytes: 64 << 20,
            logs_max_bytes: 256 << 20,
            logs_max_age: Duration::from_secs(3600),
        };
        bus.provision(&layout).await?;
        let seed = OpenKey::new_seed()?;
        Ok(Self { logs: Logs::new(&bus), server, bus, engine: Arc::default(), seed })
    }

    pub(crate) fn seal_key(&self) -> Result<SealKey> {
        Ok(OpenKey::from_seed(self.seed.clone())?.seal_key())
    }

    pub(crate) async fn relay(&self, life: &str) -> Result<Relay> {
        self.relay_with(Config::default(), life).await
    }

    /// Returns once it is ready.
    pub(crate) async fn relay_with(&self, config: Config, life: &str) -> Result<Relay> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let (stop, url) = (CancellationToken::new(), self.server.url());
        let (engine, open_key) = (self.engine.clone(), OpenKey::from_seed(self.seed.clone())?);
        let (life, stopped) = (life.to_owned(), stop.clone());
        let (is_ready, ready) = tokio::sync::oneshot::channel();
        let (tell, ended) = tokio::sync::oneshot::channel();
        let of = life.clone();
        runtime.spawn(async move {
            let run = async {
                let bus = connect_to(&url).await?;
                let parts = Parts {
                    bus,
                    engine,
                    open_key,
                    life: of,
                    lease: Lease::default(),
                    metrics: Registry::default(),
                };
                kiln_log_relay::run(config, parts, |_| is_ready.send(()).unwrap_or_default(), stopped).await
            };
            let _ = tell.send(run.await);
        });
        let relay = Relay { runtime: Some(runtime), stop, life, ended };
        tokio::time::timeout(LONG, ready).await.context("the relay is not ready")??;
        Ok(relay)
    }

    /// A build that is queued, with a git password.
    pub(crate) async fn build(&self, number: u8, password: &str) -> Result<Play> {
        self.build_sealed(number, password, &self.seal_key()?).await
    }

    pub(crate) async fn build_sealed(&self, number: u8, password: &str, key: &SealKey) -> Result<Play> {
        let record = queued(&format!("image-{number}"), [number; 10])?;
        let secrets = Secrets { git_password: password.into(), ..Default::default() };
        SecretsBucket::open(&self.bus).await?.put(&record.id, seal(key, &secrets)?).await?;
        let journal = Journal::open(&self.bus).await?;
        let by = InstanceId::new("orchestrator", 1)?;
        let id = record.id.clone();
        let tail = journal.append(None, &Change::Queued(Box::new(record)), &by).await?;
        Ok(Play { id, journal, tail, by, engine: self.engine.clone() })
    }

    /// The whole log, once it is complete.
    pub(crate) async fn log(&self, id: &BuildId) -> Result<Vec<u8>> {
        let mut chunks = std::pin::pin!(self.logs.read(
            id,
            Start::Beginning,
            Until::Complete { over: CancellationToken::new() }
        ));
        let mut log = Vec::new();
        let reading = async {
            let mut complete = false;
            while let Some(chunk) = chunks.next().await {
                let chunk = chunk?;
                assert_eq!(chunk.offset, log.len() as u64);
                log.extend_from_slice(&chunk.bytes);
                complete = chunk.complete;
            }
            assert!(complete);
            anyhow::Ok(())
        };
        tokio::time::timeout(LONG, reading).await.context("the log is not completed")??;
        Ok(log)
    }

    pub(crate) async fn text(&self, id: &BuildId) -> Result<String> {
        Ok(String::from_utf8_lossy(&self.log(id).await?).into_owned())
    }

    /// Waits until the log's tail is as wanted.
    pub(crate) async fn tail(&self, id: &BuildId, wanted: impl Fn(&LogTail) -> bool) -> Result<LogTail> {
        let waiting = async {
            loop {
                if let Some(tail) = self.logs.tail(id).await?.filter(&wanted) {
                    return anyhow::Ok(tail);
                }
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        tokio::time::timeout(LONG, waiting).await.context("the log does not get there")?
    }
}

impl Relay {
    /// As by SIGKILL, and its lease has lapsed.
    pub(crate) async fn kill(mut self, bed: &Bed) -> Result<()> {
        self.runtime.take().context("killed twice")?.shutdown_background();
        bed.bus.end_leases(&self.life).await?;
        Ok(())
    }

    /// As by SIGTERM.
    pub(crate) async fn stop(mut self) -> Result<()> {
        self.stop.cancel();
        (&mut self.ended).await?
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Play {
    /// The run of the present attempt.
    pub(crate) fn run(&self) -> RunId {
        self.tail.record.run()
    }

    pub(crate) async fn change(&mut self, change: Change) -> Result<()> {
        self.tail = self.journal.append(Some(&self.tail), &change, &self.by).await?;
        Ok(())
    }

    /// Claimed if it isn't yet, and its builder runs.
    pub(crate) async fn start(&mut self) -> Result<()> {
        if self.tail.record.claimed_by.is_none() {
            self.change(Change::Claimed { by: self.by.clone() }).await?;
        }
        let handle = self.engine.begin(&self.run());
        self.change(Change::Started { by: self.by.clone(), handle, engine: "fake".into() }).await
    }

    pub(crate) fn write(&self, output: impl Into<Bytes>) {
        self.engine.write(&self.run(), &output.into());
    }

    /// The builder's output ends.
    pub(crate) fn end(&self) {
        self.engine.end(&self.run(), Default::default());
    }

    pub(crate) async fn retry(&mut self) -> Result<()> {
        self.change(Change::Retrying { by: self.by.clone(), why: "it was lost".into() }).await
    }

    pub(crate) async fn succeed(&mut self) -> Result<()> {
        let digest = format!("sha256:{}", "a".repeat(64)).parse()?;
        self.change(Change::Succeeded { by: self.by.clone(), digest, findings: Default::default() }).await
    }
}

async fn connect(server: &NatsServer) -> Result<Bus> {
    connect_to(&server.url()).await
}

async fn connect_to(url: &str) -> Result<Bus> {
    let connect = Connect { url: url.into(), user: None, password: None, name: "test".into() };
    Ok(connect.connect().await?)
}
