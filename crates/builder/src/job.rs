//! The work of a run, from its spec to the image at the target.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use kiln_domain::failure::{Failure, FailureReason};
use kiln_domain::layer_cache::CacheRefs;
use kiln_domain::limits;
use kiln_domain::reference::{Digest, ImageReference};
use kiln_domain::run::{Base, Findings, Work};
use kiln_domain::source::DockerfileSource;
use secrecy::SecretString;
use tokio::time::{Duration, Instant, sleep};

use crate::buildah::Buildah;
use crate::buildkit::{Buildkit, Lease};
use crate::children::Children;
use crate::choice::{Tool, choose};
use crate::context;
use crate::dockerfile::{self, From};
use crate::folder::{Folder, Task};
use crate::put::Put;
use crate::target::{PATIENCE, Target, registries, registry};
use crate::tool::{BuildRequest, BuildTool, Built, ToolError, Ways};

/// How soon a registry that refuses connections is asked again.
const AGAIN: Duration = Duration::from_secs(1);

/// A run at work.
pub(crate) struct Job<'a> {
    pub(crate) folder: &'a Folder,
    pub(crate) task: &'a Task,
    pub(crate) children: &'a Children,
    pub(crate) deadline: Instant,
    /// Of Kiln's own BuildKit daemon, where that is used; the error says why it can't be.
    pub(crate) lease: &'a Result<Option<Arc<Lease>>, String>,
    pub(crate) put: &'a Put,
}

/// What is known of a job that hasn't come to its end.
#[derive(Default)]
pub(crate) struct Progress {
    pub(crate) findings: Findings,
    /// The build tool that was at work, and what it had made: to be cleared after it.
    pub(crate) tool: Option<Box<dyn BuildTool>>,
    pub(crate) built: Option<Built>,
    /// What lies at the target, once it was PUT.
    pub(crate) target: Option<Digest>,
}

impl Job<'_> {
    /// Makes the target, and tells its digest.
    pub(crate) async fn run(&self, progress: &mut Progress) -> Result<Digest, Failure> {
        let Task { spec, secrets, settings } = self.task;
        let target = Target::new(self.folder, spec, secrets, settings, self.deadline, self.put)?;
        match &spec.work {
            Work::Copy { from, platform } => {
                let digest = from.digest();
                let digest = if digest.is_some() { digest } else { target.digest(from).await };
                progress.findings.bases = vec![Base { reference: limited(from.to_string()), digest }];
                self.say(&format!("copying {from} to {}", spec.target_ref));
                target.copy(from, platform.as_ref(), |line| self.say(line)).await
            }
            Work::Build { source, commit, base_ref } => {
                source
                    .check(spec.file_remotes)
                    .map_err(|error| Failure::new(FailureReason::Context, error.to_string()))?;
                let work = self.folder.make_work().map_err(|error| no_room("the work folder", &error))?;
                let pushed = self.build(source, commit, base_ref, &work, progress).await?;
                self.say(&format!("copying {base_ref} to {}", spec.target_ref));
                let digest = target.copy_own(&base_ref.pinned(&pushed)).await?;
                progress.target = Some(digest.clone());
                let alone = source.platform.clone().unwrap_or_default();
                progress.findings.images = target.images(&digest, &alone).await;
                self.find_digests(progress).await;
                Ok(digest)
            }
        }
    }

    /// Executes the Dockerfile and pushes the result; its digest.
    async fn build(
        &self,
        source: &DockerfileSource,
        commit: &str,
        base_ref: &ImageReference,
        work: &Path,
        progress: &mut Progress,
    ) -> Result<Digest, Failure> {
        let Task { spec, secrets, settings } = self.task;
        self.say(&format!("fetching {} at {commit}", source.remote_uri));
        let context = context::fetch(source, commit, secrets, work, self.children).await?;
        let source_date_epoch = match source.reproducible {
            true => Some(context::commit_time(commit, work, self.children).await?),
            false => None,
        };
        let text = std::fs::read(&context.dockerfile).map_err(|error| no_room("the Dockerfile", &error))?;
        let images = dockerfile::images(&String::from_utf8_lossy(&text), &source.build_args);
        progress.findings.bases = images.froms.iter().take(limits::BASES).map(base).collect();

        let registries = registries(spec, settings);
        let named = images.registries();
        let mirrors = named.iter().flat_map(|registry| registries.mirrors(registry));
        let pulled_from: BTreeSet<&str> = named.iter().copied().chain(mirrors).collect();
        // What the Dockerfile has no use for, its steps shall not find.
        let mut to_pull = secrets.registries.clone();
        to_pull.retain(|host, _| pulled_from.contains(host.as_str()));
        let mut to_push = secrets.registries.clone();
        to_push.extend(secrets.push.clone());
        to_push.retain(|host, _| host == base_ref.registry());
        let ways = Ways { registries: &registries, pulled_from, pushed_to: base_ref.registry() };
        let tool = self.tool(work, to_pull, to_push, &ways)?;
        progress.findings.build_tool = tool.name().into();
        let tool = progress.tool.insert(tool);

        let request = BuildRequest {
            dockerfile: context.dockerfile,
            context: context.folder,
            build_args: source.build_args.clone(),
            target: source.target.clone(),
            no_cache: spec.no_cache,
            platforms: source.built_for(),
            provenance: source.provenance,
            source_date_epoch,
            images: images.all().cloned().collect(),
            push_to: base_ref.clone(),
            cache: self.cache(source, base_ref),
            repository: source.remote_uri.clone(),
            path: source.dockerfile().to_owned(),
        };
        let since = Instant::now();
        let built = loop {
            match tool.build(&request).await {
                Ok(built) => break built,
                Err(error) => self.wait(error, since, spec.target_ref.registry()).await?,
            }
        };
        let built = progress.built.insert(built);
        self.say(&format!("pushing {base_ref}"));
        loop {
            match tool.push(built, base_ref).await {
                Ok(digest) => return Ok(digest),
                Err(error) => self.wait(error, since, base_ref.registry()).await?,
            }
        }
    }

    /// Where in the registry layers are kept. What not all may see is its owner's; without an owner there is no cache of it.
    fn cache(&self, source: &DockerfileSource, base_ref: &ImageReference) -> Option<CacheRefs> {
        let Task { spec, secrets, settings } = self.task;
        let open = ["https://", "http://", "git://", "file://"];
        let is_open = secrets.git_password.is_none()
            && secrets.git_username.is_empty()
            && secrets.mounts.is_empty()
            && open.iter().any(|scheme| source.remote_uri.starts_with(scheme));
        let owner = (!is_open).then_some(spec.owner.as_str());
        if !settings.layer_cache.enabled || owner.is_some_and(str::is_empty) {
            return None;
        }
        CacheRefs::of(&settings.layer_cache.repository(&base_ref.name()), source, owner).ok()
    }

    /// `to_pull` and `to_push`: host → login, of the registries at hand alone.
    fn tool(
        &self,
        work: &Path,
        to_pull: BTreeMap<String, SecretString>,
        to_push: BTreeMap<String, SecretString>,
        ways: &Ways<'_>,
    ) -> Result<Box<dyn BuildTool>, Failure> {
        let Task { spec, secrets, settings } = self.task;
        let no_files = |error| no_room("the build tool's files", &error);
        let mounts = &secrets.mounts;
        let chosen = choose(settings).map_err(|problem| Failure::new(FailureReason::Internal, problem))?;
        match chosen {
            Tool::Buildah => {
                let tool = Buildah::new(settings, work, self.children, &to_pull, to_push, ways, mounts);
                Ok(Box::new(tool.map_err(no_files)?.with_no_cache(spec.no_cache)))
            }
            Tool::Buildkit => {
                let lease = self.lease.as_ref().map_err(|problem| {
                    Failure::new(FailureReason::Internal, format!("cannot use BuildKit's daemon: {problem}"))
                })?;
                let registry = registry(spec, secrets, ways.registries, self.deadline)?;
                // No step can read them: buildctl holds them, and steps run in the daemon.
                let logins = to_pull.into_iter().chain(to_push).collect();
                let tool =
                    Buildkit::new(settings, work, self.children, &logins, mounts, lease.clone(), registry);
                Ok(Box::new(tool.map_err(no_files)?.with_ways(ways)))
            }
        }
    }

    /// Waits until it is time to ask again a registry that refused; the failure, if it is not to be asked again. On the
    /// registry that is pushed to it insists until the run's deadline.
    async fn wait(&self, error: ToolError, since: Instant, pushed_to: &str) -> Result<(), Failure> {
        match error {
            ToolError::Refused { registry, .. }
                if registry.as_deref() == Some(pushed_to) || since.elapsed() < PATIENCE =>
            {
                self.say("a registry refuses connections; asking again");
                sleep(AGAIN).await;
                Ok(())
            }
            other => Err(other.into_failure()),
        }
    }

    async fn find_digests(&self, progress: &mut Progress) {
        let Some(tool) = &progress.tool else { return };
        for base in progress.findings.bases.iter_mut().filter(|base| base.digest.is_none()) {
            if let Ok(reference) = base.reference.parse() {
                base.digest = tool.digest(&reference).await;
            }
        }
    }

    fn say(&self, line: &str) {
        self.children.output().say(line);
    }
}

fn base(from: &From) -> Base {
    Base {
        reference: limited(from.text.clone()),
        digest: from.reference.as_ref().and_then(ImageReference::digest),
    }
}

fn limited(name: String) -> String {
    limits::truncated(name, limits::NAME_BYTES)
}

fn no_room(what: &str, error: &std::io::Error) -> Failure {
    Failure::new(FailureReason::Internal, format!("cannot make {what}: {error}"))
}
