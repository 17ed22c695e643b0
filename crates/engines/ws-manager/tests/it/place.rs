//! Where the tests run builders.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result};
use async_trait::async_trait;
use kiln_domain::engine::{Engine, EngineError};
use kiln_domain::id::{BuildId, ImageKey, RunId};
use kiln_domain::platform::Platform;
use kiln_domain::reference::{Digest, ImageReference};
use kiln_domain::run::{RunSecrets, RunSpec, Work};
use kiln_engine_ws_manager::{Config, CursorKey, Mark, Revocations, Tls, WsManagerEngine};
use kiln_registry::{Access, OciRegistry, Registry as _};
use kiln_testkit::engine_conformance::{ENDLESS, Job, Place};
use kiln_testkit::registry::DockerRegistry;
use kiln_testkit::ws_manager::{self, Workspace, WsManager};

pub(crate) struct WsManagerPlace {
    pub(crate) ws_manager: WsManager,
    jobs: Arc<Jobs>,
    revocations: Arc<Memory>,
    count: Mutex<u32>,
}

/// What workspaces do, by their targets.
struct Jobs {
    registry: DockerRegistry,
    of: Mutex<HashMap<String, Job>>,
}

#[derive(Default)]
struct Memory(Mutex<HashMap<RunId, Mark>>);

#[async_trait]
impl Revocations for Memory {
    async fn get(&self, run: &RunId) -> Result<Option<Mark>, EngineError> {
        Ok(self.0.lock().unwrap_or_else(PoisonError::into_inner).get(run).copied())
    }

    async fn put(&self, run: &RunId, mark: Mark) -> Result<(), EngineError> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(run.clone(), mark);
        Ok(())
    }
}

#[async_trait]
impl ws_manager::Work for Jobs {
    async fn build(&self, workspace: &Workspace) -> Result<(), String> {
        let target: ImageReference = workspace.annotation("ref").parse().map_err(|e| format!("{e}"))?;
        let job = self.of.lock().unwrap_or_else(PoisonError::into_inner).get(&target.to_string()).copied();
        match job {
            Some(Job::Fails) => return Err("exit status 1".into()),
            Some(Job::Endless) => {
                workspace.write(&format!("{ENDLESS}\n"));
                std::future::pending::<()>().await;
            }
            Some(Job::Succeeds) | None => {}
        }
        for step in 1..=30 {
            workspace.write(&format!("step {step} of the build\r\n"));
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let name = format!("{}:{}", target.repository(), target.tag().unwrap_or_default());
        let content = workspace.request.id.as_bytes();
        let pushed = self.registry.push_image(&name, "linux/amd64", &[("id", content)]).await;
        pushed.map(|_| ()).map_err(|error| error.to_string())
    }
}

impl WsManagerPlace {
    pub(crate) async fn new() -> Result<Self> {
        let jobs = Arc::new(Jobs { registry: DockerRegistry::start().await?, of: Mutex::default() });
        let ws_manager = WsManager::start(jobs.clone()).await?;
        Ok(Self { ws_manager, jobs, revocations: Arc::default(), count: Mutex::default() })
    }

    pub(crate) fn ws_engine(&self) -> WsManagerEngine {
        self.ws_engine_at(self.ws_manager.address.to_string(), None)
    }

    pub(crate) fn registry(&self) -> &DockerRegistry {
        &self.jobs.registry
    }

    /// One that reaches ws-manager somewhere else.
    #[expect(clippy::expect_used, reason = "the suite's engines can't fail to be made")]
    pub(crate) fn ws_engine_at(&self, address: String, tls: Option<Tls>) -> WsManagerEngine {
        let config =
            Config { address, tls, builder_image: "registry.test/bob:1".into(), pull_secret: String::new() };
        let registry = Arc::new(OciRegistry::default());
        let key = CursorKey::new([7; 32]);
        WsManagerEngine::start(config, self.revocations.clone(), registry, key).expect("an engine")
    }

    pub(crate) fn spec(&self, job: Job) -> Result<RunSpec> {
        let number = {
            let mut count = self.count.lock().unwrap_or_else(PoisonError::into_inner);
            *count += 1;
            *count
        };
        let target_ref = self.jobs.registry.reference(&format!("workspace:{number}"))?;
        self.jobs.of.lock().unwrap_or_else(PoisonError::into_inner).insert(target_ref.to_string(), job);
        let build = BuildId::new(&ImageKey::of(&target_ref.to_string()), [7; 10]);
        let from = format!("registry.test/base@{}", Digest::of(b"base"));
        Ok(RunSpec {
            run: RunId::new(&build, 1),
            work: Work::Copy {
                from: from.parse().context("a reference")?,
                platform: Some(Platform::default()),
            },
            target_ref,
            owner: "ann".into(),
            timeout_ms: 60_000,
            no_cache: false,
            plain_http: Vec::new(),
            file_remotes: false,
            traceparent: String::new(),
        })
    }
}

#[async_trait]
impl Place for WsManagerPlace {
    fn engine(&self) -> Arc<dyn Engine> {
        Arc::new(self.ws_engine())
    }

    fn job(&self, job: Job) -> Result<(RunSpec, RunSecrets)> {
        Ok((self.spec(job)?, RunSecrets::default()))
    }

    async fn pushed(&self, spec: &RunSpec) -> Result<Option<Digest>> {
        let access = Access::anonymous(Duration::from_secs(10));
        Ok(OciRegistry::default().digest(&spec.target_ref, &access).await?)
    }

    fn left(&self, run: &RunId) -> Result<Vec<String>> {
        let running = self.ws_manager.running();
        Ok(running.into_iter().map(|status| status.id).filter(|id| id == run.as_str()).collect())
    }
}
