//! A bus, an engine that the test plays, a journal that the test writes, and relays that can be killed.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{StreamExt as _, TryStreamExt as _};
use kiln_bus::journal::{Entry, Journal};
use kiln_bus::layout::Layout;
use kiln_bus::logs::{Chunk, LogTail, Logs, Start, Until};
use kiln_bus::seal::{OpenKey, SealKey};
use kiln_bus::secrets::{SecretsBucket, seal};
use kiln_bus::{Bus, BusError, Connect, Lease};
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

pub(crate) const LONG: Duration = Duration::from_secs(180);

pub(crate) struct Bed {
    url: String,
    replicas: usize,
    /// Of a bed on one server of its own.
    pub(crate) server: Option<NatsServer>,
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
    metrics: Registry,
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
        let bed = Self::on(&server.url(), 1).await?;
        Ok(Self { server: Some(server), ..bed })
    }

    /// On servers that the test has, to do to them what it likes.
    pub(crate) async fn on(url: &str, replicas: usize) -> Result<Self> {
        let bus = connect(url).await?;
        let seed = OpenKey::new_seed()?;
        let logs = Logs::new(&bus);
        let bed =
            Self { url: url.to_owned(), replicas, logs, server: None, bus, engine: Arc::default(), seed };
        bed.provision().await?;
        Ok(bed)
    }

    /// The logs as another process has them.
    pub(crate) async fn logs_elsewhere(&self) -> Result<Logs> {
        Ok(Logs::new(&connect(&self.url).await?))
    }

    /// Makes the streams and buckets that are missing.
    pub(crate) async fn provision(&self) -> Result<()> {
        let layout = Layout {
            replicas: self.replicas,
            journal_max_bytes: 64 << 20,
            logs_max_bytes: 512 << 20,
            logs_max_age: Duration::from_secs(3600),
        };
        Ok(self.bus.provision(&layout).await?)
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
        let (stop, url) = (CancellationToken::new(), self.url.clone());
        let (engine, open_key) = (self.engine.clone(), OpenKey::from_seed(self.seed.clone())?);
        let (life, stopped) = (life.to_owned(), stop.clone());
        let (is_ready, ready) = tokio::sync::oneshot::channel();
        let (tell, ended) = tokio::sync::oneshot::channel();
        let of = life.clone();
        runtime.spawn(async move {
            let run = async {
                let bus = connect(&url).await?;
                let parts = Parts {
                    bus,
                    engine,
                    open_key,
                    life: of,
                    lease: Lease::default(),
                    metrics: Registry::default(),
                };
                let ready = |metrics| {
                    let _ = is_ready.send(metrics);
                };
                kiln_log_relay::run(config, parts, ready, stopped).await
            };
            let _ = tell.send(run.await);
        });
        let mut relay = Relay { runtime: Some(runtime), stop, life, ended, metrics: Registry::default() };
        relay.metrics = tokio::time::timeout(LONG, ready).await.context("the relay is not ready")??;
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
        follow(&self.logs, id).try_fold(Vec::new(), append).await
    }

    /// What is there of a complete log, and the offset that it begins at.
    pub(crate) async fn kept(&self, id: &BuildId) -> Result<(u64, String)> {
        let chunks: Vec<_> = self.logs.read(id, Start::Beginning, Until::Now).collect().await;
        let chunks = chunks.into_iter().collect::<Result<Vec<_>, _>>()?;
        let first = chunks.first().context("nothing is there")?.offset;
        let log: Vec<u8> = chunks.iter().flat_map(|chunk| chunk.bytes.clone()).collect();
        Ok((first, String::from_utf8_lossy(&log).into_owned()))
    }

    pub(crate) async fn text(&self, id: &BuildId) -> Result<String> {
        Ok(String::from_utf8_lossy(&self.log(id).await?).into_owned())
    }

    /// Waits until the log's tail is as wanted, also while the bus is away.
    pub(crate) async fn tail(&self, id: &BuildId, wanted: impl Fn(&LogTail) -> bool) -> Result<LogTail> {
        let waiting = async {
            loop {
                match self.logs.tail(id).await {
                    Ok(Some(tail)) if wanted(&tail) => return anyhow::Ok(tail),
                    Ok(_) | Err(BusError::Unavailable { .. }) => {}
                    Err(error) => return Err(error.into()),
                }
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        tokio::time::timeout(LONG, waiting).await.context("the log does not get there")?
    }
}

impl Relay {
    /// Waits until a line of its metrics is as said.
    pub(crate) async fn shows(&self, line: &str) -> Result<()> {
        let look = async {
            loop {
                let mut text = String::new();
                prometheus_client::encoding::text::encode(&mut text, &self.metrics)?;
                if text.lines().any(|shown| shown == line) {
                    return anyhow::Ok(());
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(LONG, look).await.with_context(|| format!("no `{line}`"))?
    }

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

    /// Waits until the journal has a leader that answers, as who holds a build does.
    pub(crate) async fn journal_is_led(&self) -> Result<()> {
        let id = &self.tail.record.id;
        let led = async {
            while self.journal.last_of_build(id).await.is_err() {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        tokio::time::timeout(LONG, led).await.context("the journal has no leader")
    }

    pub(crate) fn holder(&self) -> InstanceId {
        self.by.clone()
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
        self.change(Change::Started {
            by: self.by.clone(),
            handle,
            engine: "fake".into(),
            build_tool: String::new(),
        })
        .await
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

/// Collects a log.
pub(crate) async fn append(mut log: Vec<u8>, bytes: Bytes) -> Result<Vec<u8>> {
    log.extend_from_slice(&bytes);
    Ok(log)
}

/// A log from its first byte to its end; an error where there is a gap, or an end too soon, or where nothing comes.
pub(crate) fn follow(logs: &Logs, id: &BuildId) -> BoxStream<'static, Result<Bytes>> {
    let until = Until::Complete { over: CancellationToken::new() };
    let chunks = logs.read(id, Start::Beginning, until).boxed();
    let next = async |(mut chunks, end, complete): (BoxStream<'static, _>, u64, bool)| {
        let chunk = tokio::time::timeout(LONG, chunks.next()).await.context("the log stands still")?;
        match chunk.transpose()? {
            Some(Chunk { offset, bytes, complete }) => {
                ensure!(offset == end, "a gap or a repeat: {offset} after {end}");
                let end = end + bytes.len() as u64;
                Ok(Some((bytes, (chunks, end, complete))))
            }
            None if complete => Ok(None),
            None => bail!("it ended at {end} without being complete"),
        }
    };
    futures::stream::try_unfold((chunks, 0, false), next).boxed()
}

async fn connect(url: &str) -> Result<Bus> {
    let connect = Connect { url: url.into(), user: None, password: None, name: "test".into() };
    Ok(connect.connect().await?)
}
