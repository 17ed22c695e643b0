//! A bus, some orchestrators, an engine whose runs the test ends, and a resolver that answers what the test says.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result};
use kiln_bus::journal::{Entry, Journal};
use kiln_bus::layout::Layout;
use kiln_bus::seal::OpenKey;
use kiln_bus::serve::Server;
use kiln_bus::{Bus, Connect, Lease};
use kiln_contract::error::Refusal;
use kiln_contract::orchestrator::{Build, BuildAnswer, Cancel, RecordAt, source_to_json};
use kiln_contract::resolver::{
    FindImage, FoundImage, ResolveCommit, ResolveImage, ResolvedCommit, ResolvedImage,
};
use kiln_domain::id::BuildId;
use kiln_domain::record::Record;
use kiln_domain::reference::{Digest, ImageReference};
use kiln_domain::run::{Ended, Findings, Outcome, RunResult};
use kiln_domain::source::Source;
use kiln_orchestrator::{Config, Parts};
use kiln_testkit::engine::FakeEngine;
use kiln_testkit::nats::{self, NatsServer};
use prometheus_client::registry::Registry;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

const SOON: Duration = Duration::from_secs(30);

pub(crate) struct Stage {
    server: NatsServer,
    pub(crate) bus: Bus,
    pub(crate) engine: Arc<FakeEngine>,
    pub(crate) journal: Journal,
    key: OpenKey,
    /// What lies at each target.
    images: Arc<Mutex<HashMap<String, Digest>>>,
    _resolver: Server,
    tasks: TaskTracker,
}

pub(crate) fn config() -> Config {
    Config {
        base_image_repository: "registry.test/base".into(),
        workspace_image_repository: "registry.test/workspace".into(),
        ..Config::default()
    }
}

impl Stage {
    pub(crate) async fn set() -> Result<Self> {
        let server = nats::run_server().await?;
        let bus = connect(&server.url()).await?;
        let layout = Layout { journal_max_bytes: 256 << 20, logs_max_bytes: 256 << 20, ..Layout::default() };
        bus.provision(&layout).await?;
        let images: Arc<Mutex<HashMap<String, Digest>>> = Arc::default();
        let resolver = Server::start(&bus, "resolver", &mut Registry::default()).await?;
        let lying = images.clone();
        resolver
            .answer(move |question: FindImage| {
                let images = lying.lock().unwrap_or_else(PoisonError::into_inner);
                let digest = images.get(&question.reference).map(ToString::to_string).unwrap_or_default();
                async move { Ok(FoundImage { digest }) }
            })
            .await?;
        resolver
            .answer(|question: ResolveImage| async move {
                let reference: ImageReference = question.reference.parse().unwrap();
                let reference = reference.pinned(&Digest::of(question.reference.as_bytes())).to_string();
                Ok(ResolvedImage { reference, stale: false, age_ms: 0 })
            })
            .await?;
        resolver.answer(|_: ResolveCommit| async { Ok(ResolvedCommit { commit: "c".repeat(40) }) }).await?;
        Ok(Self {
            journal: Journal::open(&bus).await?,
            bus,
            server,
            engine: Arc::new(FakeEngine::default()),
            key: OpenKey::from_seed(OpenKey::new_seed()?)?,
            images,
            _resolver: resolver,
            tasks: TaskTracker::new(),
        })
    }

    /// Starts an orchestrator and waits until it answers; it ends with the token.
    pub(crate) async fn orchestrator(&self, config: Config) -> Result<CancellationToken> {
        let stop = CancellationToken::new();
        let parts = Parts {
            bus: connect(&self.server.url()).await?,
            engine: self.engine.clone(),
            open_key: self.key.clone(),
            life: String::new(),
            lease: Lease::default(),
            metrics: Registry::default(),
        };
        let (ready, answers) = tokio::sync::oneshot::channel();
        let running = stop.clone();
        self.tasks.spawn(async move {
            let ready = |_| ready.send(()).unwrap_or_default();
            kiln_orchestrator::run(config, parts, ready, running).await.unwrap();
        });
        tokio::time::timeout(SOON, answers).await??;
        Ok(stop)
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

    pub(crate) fn push(&self, reference: &str, digest: &Digest) {
        self.images.lock().unwrap_or_else(PoisonError::into_inner).insert(reference.into(), digest.clone());
    }

    /// The builder pushes and says so.
    pub(crate) fn succeed(&self, record: &Record, digest: &Digest) {
        self.push(&record.target_ref, digest);
        self.engine.end(&record.run(), pushed(digest));
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
