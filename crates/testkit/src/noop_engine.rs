//! An engine whose builders build nothing: each takes a chosen time and comes to a chosen end. For tests of many builds,
//! and of what an orchestrator makes of an end, where a real builder would take seconds and a whole machine.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Result;
use async_trait::async_trait;
use kiln_domain::engine::{Cursor, Engine, EngineError, Handle, Observed, Output};
use kiln_domain::failure::{Failure, FailureReason};
use kiln_domain::id::RunId;
use kiln_domain::reference::{Digest, ImageReference};
use kiln_domain::run::{Ended, Findings, Outcome, RunResult, RunSecrets, RunSpec};
use tokio::sync::RwLock;
use tokio::task::JoinSet;

use crate::engine::FakeEngine;
use crate::registry::DockerRegistry;

/// What a builder is to do.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Written at its beginning.
    pub output: String,
    /// Then it takes so long, unless it is made to stop.
    pub takes: Duration,
    pub end: End,
}

/// What becomes of a builder's work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// It pushes an image and says so.
    Pushes,
    /// It has an outcome that is this failure.
    Fails(Failure),
    /// It says that it pushed this, and did not.
    Lies(Digest),
    /// It is gone, and has no outcome.
    Vanishes,
    /// It pushes an image, and is gone before it can say so.
    VanishesAfterPush,
}

/// Where images are pushed.
#[async_trait]
pub trait Images: Send + Sync {
    /// Puts an image at `target` that no other run pushes.
    async fn push(&self, run: &RunId, target: &ImageReference) -> Result<Digest>;
}

/// A tiny image, for real.
#[async_trait]
impl Images for DockerRegistry {
    async fn push(&self, run: &RunId, target: &ImageReference) -> Result<Digest> {
        let name = format!("{}:{}", target.repository(), target.selector());
        self.push_image(&name, "linux/amd64", &[("run", run.as_str().as_bytes())]).await
    }
}

/// The engine. Its builders end with it.
pub struct NoopEngine {
    place: Arc<Place>,
    plan: Box<dyn Fn(&RunSpec) -> Plan + Send + Sync>,
    begun: Mutex<Begun>,
}

#[derive(Default)]
struct Begun {
    runs: HashSet<RunId>,
    builders: JoinSet<()>,
}

struct Place {
    runs: FakeEngine,
    images: Arc<dyn Images>,
    /// Read by who pushes. A revocation has it for a moment: it waits for the pushes under way, and later ones find it.
    pushing: RwLock<()>,
}

impl NoopEngine {
    /// `plan` says what a run's builder is to do: by its attempt, its source or its target.
    pub fn new(images: Arc<dyn Images>, plan: impl Fn(&RunSpec) -> Plan + Send + Sync + 'static) -> Self {
        Self {
            place: Arc::new(Place { runs: FakeEngine::default(), images, pushing: RwLock::default() }),
            plan: Box::new(plan),
            begun: Mutex::default(),
        }
    }

    fn begin(&self, spec: &RunSpec) {
        let mut begun = self.begun.lock().unwrap_or_else(PoisonError::into_inner);
        while begun.builders.try_join_next().is_some() {}
        if begun.runs.insert(spec.run.clone()) {
            let (place, spec, plan) = (self.place.clone(), spec.clone(), (self.plan)(spec));
            begun.builders.spawn(async move { place.build(&spec, plan).await });
        }
    }
}

impl Place {
    async fn build(&self, spec: &RunSpec, plan: Plan) {
        self.runs.write(&spec.run, plan.output.as_bytes());
        let stopped = tokio::select! {
            () = tokio::time::sleep(plan.takes) => false,
            () = self.runs.until_stopped(&spec.run) => true,
        };
        let ended = if stopped { self.stopped(&spec.run) } else { self.end(spec, plan.end).await };
        self.runs.end(&spec.run, ended);
    }

    async fn end(&self, spec: &RunSpec, end: End) -> Ended {
        match end {
            End::Fails(failure) => told(RunResult::Failed(failure), None),
            End::Lies(digest) => told(RunResult::Pushed(digest.clone()), Some(digest)),
            End::Vanishes => Ended::default(),
            End::Pushes | End::VanishesAfterPush => {
                let _pushing = self.pushing.read().await;
                if self.runs.is_cancelled(&spec.run) || self.runs.is_revoked(&spec.run) {
                    return self.stopped(&spec.run);
                }
                match self.images.push(&spec.run, &spec.target_ref).await {
                    Ok(digest) if end == End::Pushes => told(RunResult::Pushed(digest.clone()), Some(digest)),
                    Ok(digest) => Ended { outcome: None, recorded: Some(digest) },
                    Err(error) => {
                        let failure = Failure::new(FailureReason::RegistryUnavailable, format!("{error:#}"));
                        told(RunResult::Failed(failure), None)
                    }
                }
            }
        }
    }

    /// Revoked, it has nothing to say.
    fn stopped(&self, run: &RunId) -> Ended {
        if self.runs.is_revoked(run) {
            return Ended::default();
        }
        let failure = Failure::new(FailureReason::Internal, "it was asked to stop");
        told(RunResult::Failed(failure), None)
    }
}

fn told(result: RunResult, recorded: Option<Digest>) -> Ended {
    Ended { outcome: Some(Outcome { result, findings: Findings::default() }), recorded }
}

#[async_trait]
impl Engine for NoopEngine {
    fn name(&self) -> &'static str {
        "noop"
    }

    async fn start(&self, spec: &RunSpec, secrets: &RunSecrets) -> Result<Handle, EngineError> {
        let handle = self.place.runs.start(spec, secrets).await?;
        self.begin(spec);
        Ok(handle)
    }

    async fn observe(&self, run: &RunId) -> Result<Observed, EngineError> {
        self.place.runs.observe(run).await
    }

    async fn ended(&self, run: &RunId, handle: &Handle) -> Result<Ended, EngineError> {
        self.place.runs.ended(run, handle).await
    }

    async fn cancel(&self, run: &RunId) -> Result<(), EngineError> {
        self.place.runs.cancel(run).await
    }

    async fn revoke(&self, run: &RunId) -> Result<(), EngineError> {
        self.place.runs.revoke(run).await?;
        drop(self.place.pushing.write().await);
        Ok(())
    }

    async fn remove(&self, run: &RunId) -> Result<(), EngineError> {
        self.place.runs.remove(run).await
    }

    async fn read(&self, run: &RunId, from: &Cursor, max: usize) -> Result<Output, EngineError> {
        self.place.runs.read(run, from, max).await
    }

    fn advance(&self, from: &Cursor, bytes: &[u8]) -> Cursor {
        self.place.runs.advance(from, bytes)
    }
}

#[cfg(test)]
mod tests {
    use kiln_domain::id::{BuildId, ImageKey};
    use kiln_domain::run::Work;

    use super::*;
    use crate::engine_conformance::{self, ENDLESS, Job, conformance};

    struct Place {
        registry: Arc<DockerRegistry>,
        engine: Arc<NoopEngine>,
    }

    #[async_trait]
    impl engine_conformance::Place for Place {
        fn engine(&self) -> Arc<dyn Engine> {
            self.engine.clone()
        }

        /// The target's tag says what the run is to do.
        fn job(&self, job: Job) -> Result<(RunSpec, RunSecrets)> {
            let name = format!("workspace:{job:?}-{:08x}", rand::random::<u32>());
            let target_ref = self.registry.reference(&name)?;
            let build = BuildId::new(&ImageKey::of(&target_ref.to_string()), [0; 10]);
            let spec = RunSpec {
                run: RunId::new(&build, 1),
                work: Work::Copy { from: self.registry.reference("base:1")?, platform: Default::default() },
                target_ref,
                owner: "ann".into(),
                timeout_ms: 60_000,
                no_cache: false,
                plain_http: Vec::new(),
                file_remotes: false,
                traceparent: String::new(),
            };
            Ok((spec, RunSecrets::default()))
        }

        async fn pushed(&self, spec: &RunSpec) -> Result<Option<Digest>> {
            let manifest =
                self.registry.manifest(spec.target_ref.repository(), spec.target_ref.selector()).await?;
            Ok(manifest.map(|(_, content)| Digest::of(&content)))
        }

        fn left(&self, run: &RunId) -> Result<Vec<String>> {
            Ok(self.engine.place.runs.is_there(run).then(|| run.to_string()).into_iter().collect())
        }
    }

    fn plan(spec: &RunSpec) -> Plan {
        let tag = spec.target_ref.tag().unwrap_or_default();
        let (takes, end) = if tag.starts_with("Endless") {
            (Duration::from_secs(3600), End::Pushes)
        } else if tag.starts_with("Fails") {
            (Duration::ZERO, End::Fails(Failure::new(FailureReason::Dockerfile, "no")))
        } else {
            (Duration::from_millis(5), End::Pushes)
        };
        Plan { output: format!("{ENDLESS}{}\n", ".".repeat(100)), takes, end }
    }

    #[tokio::test]
    async fn it_is_an_engine() -> Result<()> {
        let registry = Arc::new(DockerRegistry::start().await?);
        let engine = Arc::new(NoopEngine::new(registry.clone(), plan));
        conformance(&Place { registry, engine }).await
    }
}
