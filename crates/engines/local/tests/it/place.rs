use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use async_trait::async_trait;
use kiln_domain::engine::Engine;
use kiln_domain::id::RunId;
use kiln_domain::reference::Digest;
use kiln_domain::run::{RunSecrets, RunSpec};
use kiln_engine_local::{Config, LocalEngine};
use kiln_testkit::engine_conformance::{ENDLESS, Job, Place};
use kiln_testkit::workshop::{Repository, Workshop, builder_program};

pub(crate) struct LocalPlace {
    pub(crate) workshop: Workshop,
    config: Config,
    repository: Repository,
}

impl LocalPlace {
    pub(crate) async fn new() -> Result<Self> {
        let workshop = Workshop::new().await?;
        let storage = workshop.settings().storage;
        let program = tokio::task::spawn_blocking(builder_program).await??;
        let mut config = Config::new(workshop.runs(), program, storage);
        config.settings = workshop.settings();
        config.grace = Duration::from_secs(3);
        let run = |script: &str| {
            format!(
                "FROM scratch\nCOPY busybox /bin/busybox\nRUN [\"/bin/busybox\", \"sh\", \"-c\", \"{script}\"]\n"
            )
        };
        let repository = workshop.repository(
            &[
                ("good", &run("/bin/busybox seq 1 100")),
                ("bad", &run("exit 9")),
                // To make a layer of it takes longer than to write it.
                ("large", &run("/bin/busybox head -c 400000000 /dev/urandom > /large; echo all is written")),
                // It starts a process that leaves its parent, and takes no notice of a polite request.
                ("endless", &run(&format!("trap '' TERM; (/bin/busybox setsid /bin/busybox sleep 3600 &); echo {ENDLESS}; while true; do /bin/busybox sleep 1; done"))),
            ],
            &["."],
        )?;
        Ok(Self { workshop, config, repository })
    }

    pub(crate) fn local(&self) -> LocalEngine {
        LocalEngine::new(self.config.clone())
    }

    pub(crate) fn with_grace(mut self, grace: Duration) -> Self {
        self.config.grace = grace;
        self
    }

    pub(crate) fn with_program(mut self, program: &str) -> Self {
        self.config.program = program.into();
        self
    }
}

#[async_trait]
impl Place for LocalPlace {
    fn engine(&self) -> Arc<dyn Engine> {
        Arc::new(self.local())
    }

    fn job(&self, job: Job) -> Result<(RunSpec, RunSecrets)> {
        let path = match job {
            Job::Succeeds => "good",
            Job::Fails => "bad",
            Job::Endless => "endless",
        };
        let spec = self.workshop.build(&self.repository, |source| source.path = path.into())?;
        Ok((spec, RunSecrets::default()))
    }

    async fn pushed(&self, spec: &RunSpec) -> Result<Option<Digest>> {
        self.workshop.pushed(&spec.target_ref).await
    }

    fn left(&self, run: &RunId) -> Result<Vec<String>> {
        self.workshop.left(run)
    }
}
