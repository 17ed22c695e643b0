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
mod policy;
mod progress;

use std::collections::BTreeMap;
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

/// BuildKit for one run.
pub(crate) struct Buildkit {
    settings: Settings,
    work: PathBuf,
    children: Children,
    secrets: BTreeMap<String, SecretString>,
    /// The registry that is pushed to is spoken to in plain HTTP.
    plain_push: bool,
    registries: Registries,
    registry: OciRegistry,
    access: Access,
    lease: Option<Arc<Lease>>,
    /// What the images that the Dockerfile names were found to be.
    found: Mutex<Vec<(ImageReference, Digest)>>,
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
            plain_push: false,
            registries: Registries::default(),
            registry,
            access,
            lease,
            found: Mutex::default(),
        })
    }

    /// Sets how registries are reached, as far as that isn't the daemon's own configuration.
    pub(crate) fn with_ways(self, ways: &Ways<'_>) -> Self {
        let plain_push = ways.registries.is_plain(ways.pushed_to);
        Self { plain_push, registries: ways.registries.clone(), ..self }
    }

    fn command(&self, address: &str) -> Command {
        let folder = self.settings.programs.as_deref();
        let program = programs::find("buildctl", folder).unwrap_or_else(|| "buildctl".into());
        let mut command = Children::command(&program, &self.work);
        command.env("DOCKER_CONFIG", self.work.join("docker")).args(["--addr", address]);
        if let Some(tls) = self.settings.buildkit.tls.as_ref().filter(|_| address.starts_with("tcp://")) {
            command
                .arg("--tlscacert")
                .arg(&tls.ca)
                .arg("--tlscert")
                .arg(&tls.cert)
                .arg("--tlskey")
                .arg(&tls.key);
            if let Some(name) = &tls.server_name {
                command.arg("--tlsservername").arg(name);
            }
        }
        command
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

    fn build_command(
        &self,
        request: &BuildRequest,
        address: &str,
        policy: &Path,
    ) -> Result<Command, ToolError> {
        let (Some(folder), Some(name)) = (request.dockerfile.parent(), request.dockerfile.file_name()) else {
            return Err(ToolError::Failed(internal("the Dockerfile has no name".into())));
        };
        let mut command = self.command(address);
        command
            .args(["build", "--progress=rawjson", "--frontend=dockerfile.v0", "--metadata-file"])
            .arg(self.metadata())
            .arg("--source-policy-file")
            .arg(policy)
            .arg("--local")
            .arg(assigned("context", request.context.as_os_str()))
            .arg("--local")
            .arg(assigned("dockerfile", folder.as_os_str()))
            .arg("--opt")
            .arg(assigned("filename", name))
            .arg("--opt")
            .arg(format!("platform={}", request.platform.clone().unwrap_or_default()))
            .arg("--output")
            .arg(format!(
                "type=image,name={},push=true,push-by-digest=true,registry.insecure={}",
                request.push_to.name(),
                self.plain_push
            ));
        if self.frontend(request)? == Frontend::BuiltIn {
            // It takes the Dockerfile for forwarded to it already, and so looks for no other.
            command.args(["--opt", "cmdline=docker/dockerfile:1"]);
        }
        if request.no_cache {
            command.arg("--no-cache");
        }
        if !request.target.is_empty() {
            command.arg("--opt").arg(format!("target={}", request.target));
        }
        for (name, value) in request.build_args.iter().filter(|(name, _)| *name != CACHE_NAMESPACE) {
            let argument = format!("build-arg:{name}={value}");
            check_argument(name, &argument)?;
            command.arg("--opt").arg(argument);
        }
        let namespace = Digest::of(request.repository.as_bytes());
        command.arg("--opt").arg(format!("build-arg:{CACHE_NAMESPACE}={namespace}"));
        for (id, file) in secret_files::mounts(&self.secrets, &self.work).map_err(ToolError::Failed)? {
            command.arg("--secret").arg(format!("id={id},src={}", file.display()));
        }
        Ok(command)
    }

    fn frontend(&self, request: &BuildRequest) -> Result<Frontend, ToolError> {
        let text = std::fs::read(&request.dockerfile).map_err(|error| cannot_run(&error))?;
        let listed = &self.settings.buildkit.frontends;
        frontend::asked_for(&String::from_utf8_lossy(&text), &request.build_args, listed)
            .map_err(|problem| ToolError::Failed(Failure::new(FailureReason::Dockerfile, problem)))
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
        let output = self.children.output();
        output.restart_steps();
        let address = self.address(request).await?;
        let policy = self.policy(request).await?;
        let memory = Memory::new();
        let command = self.build_command(request, &address, &policy)?;
        let ended = self.children.run(command, Show::Events).await.map_err(|error| cannot_run(&error))?;
        output.end_steps();
        if !ended.status.success() {
            let step = output.failed_step();
            return Err(failure::of_build(&ended.tail, step.as_ref(), memory.exhausted(), &request.push_to));
        }
        let digest = self.pushed().map_err(|error| cannot_run(&error))?;
        Ok(Built { image: digest.to_string(), platform: request.platform.clone().unwrap_or_default() })
    }

    /// The image is at the registry already, without a name.
    async fn push(&self, built: &Built, to: &ImageReference) -> Result<Digest, ToolError> {
        let digest: Digest =
            built.image.parse().map_err(|error| cannot_run(&std::io::Error::other(error)))?;
        let from = to.pinned(&digest);
        let tagged =
            self.registry.copy(&from, to, &built.platform, &self.access, &mut |_| Ok(Box::new(()))).await;
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

/// `NAME=VALUE`, where the value is a path.
fn assigned(name: &str, value: &std::ffi::OsStr) -> std::ffi::OsString {
    let mut argument = std::ffi::OsString::from(format!("{name}="));
    argument.push(value);
    argument
}

fn internal(problem: String) -> Failure {
    Failure::new(FailureReason::Internal, problem)
}

fn cannot_run(error: &std::io::Error) -> ToolError {
    ToolError::Failed(internal(format!("cannot run buildctl: {error}")))
}
