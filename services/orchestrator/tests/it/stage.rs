//! A bus, some orchestrators, an engine whose runs the test ends, and a resolver that answers what the test says.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result};
use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt as _;
use kiln_bus::events;
use kiln_bus::holders::{Holders, Member};
use kiln_bus::journal::{Entry, Journal};
use kiln_bus::layout::Layout;
use kiln_bus::logs::Logs;
use kiln_bus::seal::OpenKey;
use kiln_bus::secrets::{self, SecretsBucket};
use kiln_bus::serve::Server;
use kiln_bus::{Bus, Connect, Lease};
use kiln_contract::error::Refusal;
use kiln_contract::orchestrator::{Build, BuildAnswer, Cancel, RecordAt, source_to_json};
use kiln_contract::resolver::{
    FindImage, FoundImage, ResolveCommit, ResolveImage, ResolvedCommit, ResolvedImage,
};
use kiln_contract::secrets::Secrets;
use kiln_contract::subject;
use kiln_domain::engine::Engine;
use kiln_domain::id::{BuildId, InstanceId, RunId};
use kiln_domain::record::Record;
use kiln_domain::reference::{Digest, ImageReference};
use kiln_domain::run::{Ended, Findings, Outcome, RunResult};
use kiln_domain::source::Source;
use kiln_orchestrator::{Config, Parts};
use kiln_testkit::engine::FakeEngine;
use kiln_testkit::nats::{self, NatsServer};
use kiln_testkit::noop_engine::Images;
use kiln_testkit::wire::Wire;
use prometheus_client::registry::Registry;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

const SOON: Duration = Duration::from_secs(30);
/// Seconds of a lease, so that a test needn't wait for half a minute until one lapses.
const SHORT: u64 = 3;

pub(crate) struct Stage {
    server: NatsServer,
    pub(crate) bus: Bus,
    pub(crate) engine: Arc<FakeEngine>,
    pub(crate) journal: Journal,
    key: OpenKey,
    /// What lies at each target.
    images: Arc<Mutex<HashMap<String, Digest>>>,
    /// What the resolver was given with questions for commits, still sealed.
    asked_with: Arc<Mutex<Vec<bytes::Bytes>>>,
    /// Open, unless the registry is to keep everybody waiting; and how many wait.
    registry: Arc<Gate>,
    _resolver: Server,
    orchestrators: TaskTracker,
    tasks: TaskTracker,
}

pub(crate) fn config() -> Config {
    Config {
        base_image_repository: "registry.test/base".into(),
        workspace_image_repository: "registry.test/workspace".into(),
        ..Config::default()
    }
}

const JOURNAL_MAX_BYTES: i64 = 256 << 20;

fn layout(journal_max_bytes: i64) -> Layout {
    Layout { journal_max_bytes, logs_max_bytes: 256 << 20, ..Layout::default() }
}

impl Stage {
    pub(crate) async fn set() -> Result<Self> {
        Self::with_journal(JOURNAL_MAX_BYTES).await
    }

    /// With a journal of so many bytes: room for twelve full records is kept for each active build.
    pub(crate) async fn with_journal(journal_max_bytes: i64) -> Result<Self> {
        let server = nats::run_server().await?;
        let bus = connect(&server.url()).await?;
        bus.provision(&layout(journal_max_bytes)).await?;
        let images: Arc<Mutex<HashMap<String, Digest>>> = Arc::default();
        let resolver = Server::start(&bus, "resolver", &mut Registry::default()).await?;
        let registry = Arc::new(Gate::default());
        let (lying, gate) = (images.clone(), registry.clone());
        resolver
            .answer(move |question: FindImage| {
                let (lying, gate) = (lying.clone(), gate.clone());
                async move {
                    gate.pass().await?;
                    let images = lying.lock().unwrap_or_else(PoisonError::into_inner);
                    let digest = images.get(&question.reference).map(ToString::to_string).unwrap_or_default();
                    Ok(FoundImage { digest })
                }
            })
            .await?;
        resolver
            .answer(|question: ResolveImage| async move {
                let reference: ImageReference = question.reference.parse().unwrap();
                let reference = reference.pinned(&Digest::of(question.reference.as_bytes())).to_string();
                Ok(ResolvedImage { reference, ..Default::default() })
            })
            .await?;
        let asked_with: Arc<Mutex<Vec<bytes::Bytes>>> = Arc::default();
        let kept = asked_with.clone();
        resolver
            .answer(move |question: ResolveCommit| {
                kept.lock().unwrap_or_else(PoisonError::into_inner).push(question.secrets);
                async { Ok(ResolvedCommit { commit: "c".repeat(40) }) }
            })
            .await?;
        Ok(Self {
            journal: Journal::open(&bus).await?,
            bus,
            server,
            engine: Arc::new(FakeEngine::default()),
            key: OpenKey::from_seed(OpenKey::new_seed()?)?,
            images,
            asked_with,
            registry,
            _resolver: resolver,
            orchestrators: TaskTracker::new(),
            tasks: TaskTracker::new(),
        })
    }

    /// Starts an orchestrator and waits until it answers; it ends with the token.
    pub(crate) async fn orchestrator(&self, config: Config) -> Result<CancellationToken> {
        self.orchestrator_at(&self.server.url(), Lease::default(), self.engine.clone(), config).await
    }

    /// One that reaches the bus over a wire, holds a short lease, and has an engine of its own, with the same runs.
    pub(crate) async fn orchestrator_on(&self, wire: &Wire) -> Result<(CancellationToken, Arc<FakeEngine>)> {
        let (url, engine) = (format!("nats://{}", wire.address()), Arc::new(self.engine.elsewhere()));
        let stop = self.orchestrator_at(&url, Lease::of_seconds(SHORT), engine.clone(), config()).await?;
        Ok((stop, engine))
    }

    /// Somebody who takes no part, and sees who lives.
    pub(crate) async fn observer(&self) -> Result<Holders> {
        Ok(Holders::start(
            &self.bus,
            Member { role: "observer", ..Member::default() },
            Lease::of_seconds(SHORT),
            &self.tasks,
        )
        .await?)
    }

    pub(crate) async fn orchestrator_at(
        &self,
        url: &str,
        lease: Lease,
        engine: Arc<dyn Engine>,
        config: Config,
    ) -> Result<CancellationToken> {
        let stop = CancellationToken::new();
        let parts = Parts {
            bus: connect(url).await?,
            engine,
            installation: Arc::default(),
            open_key: self.key.clone(),
            life: String::new(),
            lease,
            metrics: Registry::default(),
        };
        let (ready, answers) = tokio::sync::oneshot::channel();
        let running = stop.clone();
        self.orchestrators.spawn(async move {
            let ready = |_| ready.send(()).unwrap_or_default();
            kiln_orchestrator::run(config, parts, ready, running).await.unwrap();
        });
        tokio::time::timeout(SOON, answers).await??;
        Ok(stop)
    }

    /// Returns once every orchestrator has ended.
    pub(crate) async fn all_end(&self, within: Duration) -> Result<()> {
        self.orchestrators.close();
        tokio::time::timeout(within, self.orchestrators.wait()).await.context("an orchestrator goes on")
    }

    pub(crate) async fn ask(
        &self,
        image: &str,
        change: impl FnOnce(&mut Build),
    ) -> Result<BuildAnswer, Refusal> {
        let source = Source::Image(format!("registry.test/{image}:1").parse().unwrap());
        let mut question = Build {
            request_id: format!("{:x}", rand::random::<u64>()),
            source: source_to_json(&source)?,
            owner: "ann".into(),
            ..Build::default()
        };
        change(&mut question);
        self.bus.ask(&question, SOON).await
    }

    /// Somebody deletes the journal, and it is made again, empty.
    pub(crate) async fn lose_journal(&self) -> Result<()> {
        self.server.delete_stream(subject::JOURNAL_STREAM).await?;
        Ok(self.bus.provision(&layout(JOURNAL_MAX_BYTES)).await?)
    }

    /// The journal is to hold no more than so many bytes.
    pub(crate) async fn limit_journal(&self, journal_max_bytes: i64) -> Result<()> {
        Ok(self.bus.provision(&layout(journal_max_bytes)).await?)
    }

    /// Asks for a build and gives its record.
    pub(crate) async fn begin(&self, image: &str, change: impl FnOnce(&mut Build)) -> Result<Record> {
        Ok(self.ask(image, change).await?.build.context("a build")?.record()?)
    }

    pub(crate) async fn cancel(&self, id: &BuildId) -> Result<RecordAt, Refusal> {
        self.bus.ask(&Cancel { build_id: id.to_string(), reason: "enough".into() }, SOON).await
    }

    /// Waits until the build's last event is as wanted.
    pub(crate) async fn until(&self, id: &BuildId, wanted: impl Fn(&Entry) -> bool) -> Result<Entry> {
        let look = async {
            loop {
                if let Some(entry) = self.journal.last_of_build(id).await?
                    && wanted(&entry)
                {
                    return Ok::<_, anyhow::Error>(entry);
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        match tokio::time::timeout(SOON, look).await {
            Ok(entry) => entry,
            Err(_) => anyhow::bail!("the build stays at {:?}", self.journal.last_of_build(id).await?),
        }
    }

    /// A wire to the bus.
    pub(crate) async fn wire(&self) -> Result<Wire> {
        Wire::to(&self.server.address()).await
    }

    /// The events of a build up to its last one, each with its name.
    pub(crate) async fn history(&self, id: &BuildId) -> Result<Vec<(String, events::Event)>> {
        let last = self.journal.last_of_build(id).await?.context("no such build")?.sequence;
        let mut events =
            std::pin::pin!(events::subscribe(&self.server.url(), events::From::Beginning).await?);
        let mut history = Vec::new();
        while let Some(event) = tokio::time::timeout(SOON, events.next()).await?.transpose()? {
            if event.build == id.as_str() {
                let name = event.kind.rsplit('.').nth(1).unwrap_or_default().to_owned();
                history.push((name, event.clone()));
            }
            if event.sequence >= last {
                break;
            }
        }
        Ok(history)
    }

    /// The names of a build's events.
    pub(crate) async fn events(&self, id: &BuildId) -> Result<Vec<String>> {
        Ok(self.history(id).await?.into_iter().map(|(event, _)| event).collect())
    }

    /// The secrets that each question for a commit came with.
    pub(crate) fn asked_with(&self) -> Result<Vec<Secrets>> {
        let asked = self.asked_with.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(asked.iter().map(|sealed| secrets::open(&self.key, sealed)).collect::<Result<_, _>>()?)
    }

    /// The secrets that are kept for a build.
    pub(crate) async fn kept_for(&self, id: &BuildId) -> Result<Secrets> {
        let sealed = SecretsBucket::open(&self.bus).await?.get(id).await?.context("nothing is kept")?;
        Ok(secrets::open(&self.key, &sealed)?)
    }

    pub(crate) fn seal(&self, secrets: &Secrets) -> Result<bytes::Bytes> {
        Ok(secrets::seal(&self.key.seal_key(), secrets)?)
    }

    /// From now on whoever asks what lies at a target waits, until the gate is opened.
    pub(crate) fn registry(&self) -> &Gate {
        &self.registry
    }

    /// For builders that push by themselves.
    pub(crate) fn images(&self) -> Arc<dyn Images> {
        Arc::new(Lying(self.images.clone()))
    }

    /// The address of the bus.
    pub(crate) fn url(&self) -> String {
        self.server.url()
    }

    pub(crate) fn image(&self, reference: &str) -> Option<Digest> {
        self.images.lock().unwrap_or_else(PoisonError::into_inner).get(reference).cloned()
    }

    pub(crate) fn push(&self, reference: &str, digest: &Digest) {
        self.images.lock().unwrap_or_else(PoisonError::into_inner).insert(reference.into(), digest.clone());
    }

    /// What a relay does at a build's end.
    pub(crate) async fn complete_log(&self, build: &Record) -> Result<()> {
        let (logs, relay) = (Logs::new(&self.bus), InstanceId::new("log-relay", 1)?);
        let mut writer = logs.claim(&build.id, &relay, None).await?;
        let source = writer.source().clone();
        Ok(writer.append(Bytes::new(), source, true).await?)
    }

    /// The builder pushes and says so.
    pub(crate) fn succeed(&self, record: &Record, digest: &Digest) {
        self.push(&record.target_ref, digest);
        self.engine.end(&record.run(), pushed(digest));
    }
}

/// The played registry, as builders see it.
struct Lying(Arc<Mutex<HashMap<String, Digest>>>);

#[async_trait]
impl Images for Lying {
    async fn push(&self, run: &RunId, target: &ImageReference) -> Result<Digest> {
        let digest = Digest::of(run.as_str().as_bytes());
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(target.to_string(), digest.clone());
        Ok(digest)
    }
}

/// Where questions wait while it is shut.
#[derive(Default)]
pub(crate) struct Gate {
    shut: watch::Sender<bool>,
    waiting: watch::Sender<usize>,
    refuses_with: Mutex<Option<Refusal>>,
}

impl Gate {
    pub(crate) fn shut(&self) {
        self.shut.send_replace(true);
    }

    pub(crate) fn open(&self) {
        self.shut.send_replace(false);
    }

    /// From now on this is what each question is answered with.
    pub(crate) fn refuse(&self, refusal: Refusal) {
        *self.refuses_with.lock().unwrap_or_else(PoisonError::into_inner) = Some(refusal);
    }

    pub(crate) fn answer(&self) {
        *self.refuses_with.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Returns once somebody waits.
    pub(crate) async fn somebody_waits(&self) -> Result<()> {
        let mut waiting = self.waiting.subscribe();
        tokio::time::timeout(SOON, waiting.wait_for(|waiting| *waiting > 0)).await??;
        Ok(())
    }

    async fn pass(&self) -> Result<(), Refusal> {
        self.waiting.send_modify(|waiting| *waiting += 1);
        // Fails only where the sender is gone, which we hold.
        let _ = self.shut.subscribe().wait_for(|shut| !shut).await;
        self.waiting.send_modify(|waiting| *waiting -= 1);
        match &*self.refuses_with.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(refusal) => Err(refusal.clone()),
            None => Ok(()),
        }
    }
}

pub(crate) fn pushed(digest: &Digest) -> Ended {
    ended(RunResult::Pushed(digest.clone()), Some(digest.clone()))
}

pub(crate) fn ended(result: RunResult, recorded: Option<Digest>) -> Ended {
    Ended { outcome: Some(Outcome { result, findings: Findings::default() }), recorded }
}

async fn connect(url: &str) -> Result<Bus> {
    Ok(Connect { url: url.to_owned(), user: None, password: None, name: "test".into() }.connect().await?)
}
