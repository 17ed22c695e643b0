//! BuildKit: `buildctl` as a child, against Kiln's own daemon or one of those that the configuration names.
//!
//! - buildctl holds the session: context, secrets and credentials come from the run's folder, and end with it.
//! - The daemon pushes by digest alone; the tag is PUT by this process. So a daemon that is slow to notice that its client
//!   is gone changes nothing that anybody looks at.
//! - The daemon's cache is common to all builds, so each image that a Dockerfile names is asked for at its registry with
//!   *this* build's credentials before it is used ([`policy`]), and cache mounts are those of one repository.

mod daemon;
mod failure;
mod frontend;
mod keeper;
mod layers;
mod platforms;
mod policy;
mod progress;

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use kiln_domain::failure::{Failure, FailureReason};
use kiln_domain::rank::ranked;
use kiln_domain::reference::{Digest, ImageReference};
use kiln_domain::registries::Registries;
use kiln_domain::run_folder::Settings;
use kiln_registry::{Access, OciRegistry, Registry as _};
use secrecy::SecretString;
use tokio::process::Command;
use tokio::time::{Duration, timeout};

pub(crate) use self::daemon::{Lease, Place};
pub use self::keeper::keep;
pub(crate) use self::progress::Plain;
use crate::buildkit::frontend::Frontend;
use crate::children::{Children, Show};
use crate::export::Export;
use crate::folder::write_private;
use crate::memory::Memory;
use crate::tool::{BuildRequest, BuildTool, Built, ToolError, Ways, check_argument};
use crate::{programs, secret_files, target};

/// How long an image's registry may be out of reach before it is BuildKit that says so.
const ASKING: Duration = Duration::from_secs(5);
/// How long a daemon may take to answer before the next one is asked.
const ANSWERING: Duration = Duration::from_secs(10);
/// The build arg that keeps cache mounts of one name apart; not for a request to set.
const CACHE_NAMESPACE: &str = "BUILDKIT_CACHE_MOUNT_NS";

/// The build arg that says which time files get; one that a request sets goes before the commit's.
const EPOCH: &str = "SOURCE_DATE_EPOCH";

/// BuildKit for one run.
pub(crate) struct Buildkit {
    settings: Settings,
    work: PathBuf,
    children: Children,
    secrets: BTreeMap<String, SecretString>,
    logins: BTreeMap<String, SecretString>,
    /// The registry that is pushed to is spoken to in plain HTTP.
    plain_push: bool,
    registries: Registries,
    registry: OciRegistry,
    access: Access,
    lease: Option<Arc<Lease>>,
    /// What is to be exported of a build that succeeded.
    export: Mutex<Option<Export>>,
    /// What the images that the Dockerfile names were found to be.
    found: Mutex<Vec<(ImageReference, Digest)>>,
}

/// One try of a build.
struct Attempt<'a> {
    request: &'a BuildRequest,
    address: &'a str,
    /// Caches to begin with.
    imports: &'a [ImageReference],
}

/// How it failed, and buildctl's own words.
struct Failed {
    error: ToolError,
    words: String,
}

impl Buildkit {
    /// Writes what buildctl reads into the work folder. `lease`: the own daemon's, where that is to be used.
    pub(crate) fn new(
        settings: &Settings,
        work: &Path,
        children: &Children,
        registries: &BTreeMap<String, SecretString>,
        secrets: &BTreeMap<String, SecretString>,
        lease: Option<Arc<Lease>>,
        (registry, access): (OciRegistry, Access),
    ) -> std::io::Result<Self> {
        std::fs::create_dir_all(work.join("docker"))?;
        write_private(
            &work.join("docker/config.json"),
            secret_files::registry_logins(registries).as_bytes(),
        )?;
        Ok(Self {
            settings: settings.clone(),
            work: work.to_owned(),
            children: children.clone(),
            secrets: secrets.clone(),
            logins: registries.clone(),
            plain_push: false,
            registries: Registries::default(),
            registry,
            access,
            lease,
            export: Mutex::default(),
            found: Mutex::default(),
        })
    }

    /// Sets how registries are reached, as far as that isn't the daemon's own configuration.
    pub(crate) fn with_ways(self, ways: &Ways<'_>) -> Self {
        let plain_push = ways.registries.is_plain(ways.pushed_to);
        Self { plain_push, registries: ways.registries.clone(), ..self }
    }

    fn command(&self, address: &str) -> Command {
        command(&self.settings, &self.work, address)
    }

    /// The daemon for this build: the own one, or the first of its own order that answers, so that a build meets the cache
    /// that its last one filled.
    async fn address(&self, request: &BuildRequest) -> Result<String, ToolError> {
        let addresses = &self.settings.buildkit.addresses;
        if addresses.is_empty() {
            let lease = self
                .lease
                .as_ref()
                .ok_or_else(|| ToolError::Lost("BuildKit's daemon is not in use".into()))?;
            return lease.ready().await.map_err(|problem| ToolError::Failed(internal(problem)));
        }
        let build = format!("{} {}", request.repository, request.path);
        let mut problem = String::new();
        for address in ranked(&build, addresses.iter().map(String::as_str)) {
            let mut command = self.command(address);
            command.args(["debug", "workers"]);
            match timeout(ANSWERING, self.children.run(command, Show::Nothing)).await {
                Ok(Ok(ended)) if ended.status.success() => return Ok(address.to_owned()),
                Ok(Ok(ended)) => problem = ended.tail.trim().to_owned(),
                Ok(Err(error)) => return Err(cannot_run(&error)),
                Err(_) => {
                    problem = format!("no answer within {ANSWERING:?}");
                    self.children.end_all().await;
                }
            }
            self.children.output().say(&format!("the BuildKit at {address} can't be used: {problem}"));
        }
        Err(ToolError::Lost(format!(
            "none of the {} BuildKit daemons can be used: {problem}",
            addresses.len()
        )))
    }

    /// Asks for each image that the Dockerfile names, and writes what BuildKit may so use.
    async fn policy(&self, request: &BuildRequest) -> Result<PathBuf, ToolError> {
        let access = Access { patience: ASKING, insist_on: None, ..self.access.clone() };
        let mut found: Vec<(ImageReference, Digest)> = Vec::new();
        for image in &request.images {
            if found.iter().any(|(known, _)| known == image) {
                continue;
            }
            match target::digest(&self.registry, &self.registries, image, &access).await {
                Ok(Some(digest)) => found.push((image.clone(), digest)),
                // It may be the base of a stage that isn't built: whether it is needed is BuildKit's to tell.
                Ok(None) => {}
                Err(error) => self.children.output().say(&format!("{image} can't be asked for: {error}")),
            }
        }
        let file = self.work.join("policy.json");
        std::fs::write(&file, policy::of(&found).to_string()).map_err(|error| cannot_run(&error))?;
        *self.found.lock().unwrap_or_else(PoisonError::into_inner) = found;
        Ok(file)
    }

    fn build_command(&self, arguments: &[OsString], build: &Attempt<'_>) -> Result<Command, ToolError> {
        let Attempt { request, address, imports } = build;
        let mut command = self.command(address);
        command
            .args(["build", "--progress=rawjson", "--metadata-file"])
            .arg(self.metadata())
            .args(arguments)
            .arg("--output")
            .arg(format!(
                "type=image,name={},push=true,push-by-digest=true,registry.insecure={}{}{}",
                request.push_to.name(),
                self.plain_push,
                // A layer that a cache has compressed otherwise is of no use to older clients, and of another digest.
                if request.cache.is_some() { ",compression=gzip,force-compression=true" } else { "" },
                if request.source_date_epoch.is_some() { ",rewrite-timestamp=true" } else { "" }
            ));
        if request.provenance {
            command.args(["--opt", "attest:provenance=mode=max"]);
        }
        for cache in *imports {
            let plain = self.registries.is_plain(cache.registry());
            command.arg("--import-cache").arg(format!("type=registry,ref={cache},registry.insecure={plain}"));
        }
        if request.no_cache {
            command.arg("--no-cache");
        }
        for (id, file) in secret_files::mounts(&self.secrets, &self.work).map_err(ToolError::Failed)? {
            command.arg("--secret").arg(format!("id={id},src={}", file.display()));
        }
        Ok(command)
    }

    /// What is built, as buildctl's arguments: whatever changes the image. Paths are relative to the work folder.
    fn arguments(&self, request: &BuildRequest, policy: &Path) -> Result<Vec<OsString>, ToolError> {
        let (Some(folder), Some(name)) = (request.dockerfile.parent(), request.dockerfile.file_name()) else {
            return Err(ToolError::Failed(internal("the Dockerfile has no name".into())));
        };
        let work = self.work.canonicalize().map_err(|error| cannot_run(&error))?;
        let relative = |path: &Path| path.strip_prefix(&work).unwrap_or(path).as_os_str().to_owned();
        let mut arguments: Vec<OsString> = vec!["--frontend=dockerfile.v0".into()];
        let mut add = |flag: &str, value: OsString| arguments.extend([flag.into(), value]);
        add("--source-policy-file", relative(policy));
        add("--local", assigned("context", &relative(&request.context)));
        add("--local", assigned("dockerfile", &relative(folder)));
        add("--opt", assigned("filename", name));
        let platforms: Vec<_> = request.platforms.iter().map(ToString::to_string).collect();
        add("--opt", format!("platform={}", platforms.join(",")).into());
        if self.frontend(request)? == Frontend::BuiltIn {
            // It takes the Dockerfile for forwarded to it already, and so looks for no other.
            add("--opt", "cmdline=docker/dockerfile:1".into());
        }
        if !request.target.is_empty() {
            add("--opt", format!("target={}", request.target).into());
        }
        for (name, value) in request.build_args.iter().filter(|(name, _)| *name != CACHE_NAMESPACE) {
            let argument = format!("build-arg:{name}={value}");
            check_argument(name, &argument)?;
            add("--opt", argument.into());
        }
        if let Some(time) = request.source_date_epoch.filter(|_| !request.build_args.contains_key(EPOCH)) {
            add("--opt", format!("build-arg:{EPOCH}={time}").into());
        }
        let namespace = Digest::of(request.repository.as_bytes());
        add("--opt", format!("build-arg:{CACHE_NAMESPACE}={namespace}").into());
        Ok(arguments)
    }

    fn frontend(&self, request: &BuildRequest) -> Result<Frontend, ToolError> {
        let text = std::fs::read(&request.dockerfile).map_err(|error| cannot_run(&error))?;
        let listed = &self.settings.buildkit.frontends;
        frontend::asked_for(&String::from_utf8_lossy(&text), &request.build_args, listed)
            .map_err(|problem| ToolError::Failed(Failure::new(FailureReason::Dockerfile, problem)))
    }

    async fn attempt(&self, arguments: &[OsString], build: &Attempt<'_>) -> Result<Built, Failed> {
        let output = self.children.output();
        let failed = |error| Failed { error, words: String::new() };
        let memory = Memory::new();
        let command = self.build_command(arguments, build).map_err(failed)?;
        let ended = self.children.run(command, Show::Events).await;
        let ended = ended.map_err(|error| failed(cannot_run(&error)))?;
        output.end_steps();
        let request = build.request;
        if !ended.status.success() {
            let (step, exhausted) = (output.failed_step(), memory.exhausted());
            let error = failure::of_build(&ended.tail, step.as_ref(), exhausted, &request.push_to);
            return Err(Failed { error, words: ended.tail });
        }
        let digest = self.pushed().map_err(|error| failed(cannot_run(&error)))?;
        Ok(Built { image: digest.to_string() })
    }

    fn metadata(&self) -> PathBuf {
        self.work.join("metadata.json")
    }

    fn pushed(&self) -> std::io::Result<Digest> {
        let metadata: serde_json::Value = serde_json::from_slice(&std::fs::read(self.metadata())?)?;
        let digest = metadata.get("containerimage.digest").and_then(serde_json::Value::as_str);
        digest.unwrap_or_default().parse().map_err(std::io::Error::other)
    }
}

#[async_trait]
impl BuildTool for Buildkit {
    fn name(&self) -> &'static str {
        "buildkit"
    }

    async fn build(&self, request: &BuildRequest) -> Result<Built, ToolError> {
        self.children.output().restart_steps();
        let address = self.address(request).await?;
        self.check_platforms(request, &address).await?;
        let cache = request.cache.as_ref().filter(|_| !request.no_cache);
        let imports = async { Some(self.imports(cache?).await) };
        let (policy, imports) = tokio::join!(self.policy(request), imports);
        let (arguments, imports) = (self.arguments(request, &policy?)?, imports.unwrap_or_default());
        let begin = |imports| Attempt { request, address: &address, imports };
        let mut ended = self.attempt(&arguments, &begin(&imports)).await;
        if let Err(Failed { error, words }) = &ended
            && !imports.is_empty()
            && layers::may_be_at_fault(error, words)
        {
            self.children.output().say("once more, without the layers of earlier builds");
            self.children.output().restart_steps();
            ended = self.attempt(&arguments, &begin(&[])).await;
        }
        let built = ended.map_err(|failed| failed.error)?;
        *self.export.lock().unwrap_or_else(PoisonError::into_inner) =
            self.to_export(request, &address, &arguments);
        Ok(built)
    }

    fn export(&self) -> Option<Export> {
        self.export.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// The image is at the registry already, without a name.
    async fn push(&self, built: &Built, to: &ImageReference) -> Result<Digest, ToolError> {
        let digest: Digest =
            built.image.parse().map_err(|error| cannot_run(&std::io::Error::other(error)))?;
        let from = to.pinned(&digest);
        let tagged = self.registry.copy(&from, to, None, &self.access, &mut |_| Ok(Box::new(()))).await;
        tagged.map_err(|error| ToolError::Failed(target::failure(&error, &from, to)))
    }

    async fn digest(&self, image: &ImageReference) -> Option<Digest> {
        let found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        found.iter().find(|(known, _)| known == image).map(|(_, digest)| digest.clone())
    }

    /// What it leaves is in the daemon, which clears up itself.
    async fn clear(&self, _built: Option<&Built>) -> bool {
        true
    }
}

/// buildctl in a work folder, for the daemon at an address.
pub(crate) fn command(settings: &Settings, work: &Path, address: &str) -> Command {
    let program = programs::find("buildctl", settings.programs.as_deref());
    let mut command = Children::command(&program.unwrap_or_else(|| "buildctl".into()), work);
    command.env("DOCKER_CONFIG", work.join("docker")).args(["--addr", address]);
    if let Some(tls) = settings.buildkit.tls.as_ref().filter(|_| address.starts_with("tcp://")) {
        command.arg("--tlscacert").arg(&tls.ca).arg("--tlscert").arg(&tls.cert).arg("--tlskey").arg(&tls.key);
        if let Some(name) = &tls.server_name {
            command.arg("--tlsservername").arg(name);
        }
    }
    command
}

/// `NAME=VALUE`, where the value is a path.
fn assigned(name: &str, value: &OsStr) -> OsString {
    let mut argument = OsString::from(format!("{name}="));
    argument.push(value);
    argument
}

fn internal(problem: String) -> Failure {
    Failure::new(FailureReason::Internal, problem)
}

fn cannot_run(error: &std::io::Error) -> ToolError {
    ToolError::Failed(internal(format!("cannot run buildctl: {error}")))
}
