//! buildah (Debian's 1.28): no daemon, its layers in a storage that all builds of the installation share.
//!
//! - `--pull-always`: the registry must give each base image to *this* build's credentials; a layer that another build
//!   pulled with other credentials is never taken for granted, nor can a FROM name an image by its local id.
//! - Registries, policy and credentials come from files of the run alone: the host's own configuration plays no part.
//! - Build args are arguments (1.28 takes them in no file, and a name such as `LD_PRELOAD` must not get into buildah's own
//!   environment). They are no secrets: they stand in the build's record.
//! - Containers are marked by the run's own (empty) hooks folder, which buildah notes of each: so that those of a build
//!   that was killed can be told from those of the builds beside it.

mod failure;
mod files;
mod refusal;
mod storage;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;
use kiln_domain::failure::{Failure, FailureReason};
use kiln_domain::platform::Platform;
use kiln_domain::reference::{Digest, ImageReference};
use kiln_domain::registries::Registries;
use kiln_domain::run_folder::Settings;
use secrecy::SecretString;
use tokio::process::Command;
use tokio::time::Instant;

pub(crate) use self::storage::{Storage, boot_id};
use crate::children::{Children, Show, home};
use crate::folder::write_private;
use crate::memory::Memory;
use crate::secret_files;
use crate::tool::{BuildRequest, BuildTool, Built, ToolError, Ways, check_argument};

/// Credentials in the work folder: those of the FROMs, and those of the push.
const TO_PULL: &str = "auth.json";
const TO_PUSH: &str = "push-auth.json";

/// A container without a note of whose it is after this long belongs to a buildah that was killed before it wrote one.
const NOTED_WITHIN: Duration = Duration::from_secs(20);
/// How often it is looked whether it has one by now.
const LOOK: Duration = Duration::from_millis(200);
/// In the work folder: containers whose removal has begun. Of one that was killed at that, the note of whose it is may be gone.
const REMOVING: &str = "removing";

/// buildah for one run.
pub(crate) struct Buildah {
    settings: Settings,
    work: PathBuf,
    children: Children,
    secrets: BTreeMap<String, SecretString>,
    to_push: BTreeMap<String, SecretString>,
    /// The registry that is pushed to, and how registries are reached.
    push_trust: (String, Registries),
    no_cache: bool,
}

impl Buildah {
    /// Writes what buildah reads into the work folder.
    ///
    /// `to_pull` and `to_push`: host → `username:password`.
    pub(crate) fn new(
        settings: &Settings,
        work: &Path,
        children: &Children,
        to_pull: &BTreeMap<String, SecretString>,
        to_push: BTreeMap<String, SecretString>,
        ways: &Ways<'_>,
        secrets: &BTreeMap<String, SecretString>,
    ) -> std::io::Result<Self> {
        std::fs::create_dir_all(work.join("hooks"))?;
        write_private(&work.join(TO_PULL), secret_files::registry_logins(to_pull).as_bytes())?;
        tell_registries(work, ways)?;
        let buildah = Self::of(settings, work, children);
        std::fs::create_dir_all(buildah.storage().root())?;
        buildah.storage().forget_other_boots();
        let push_trust = (ways.pushed_to.to_owned(), ways.registries.clone());
        Ok(Self { secrets: secrets.clone(), to_push, push_trust, ..buildah })
    }

    /// One that only clears what an earlier one left.
    pub(crate) fn of(settings: &Settings, work: &Path, children: &Children) -> Self {
        Self {
            settings: settings.clone(),
            work: work.to_owned(),
            children: children.clone(),
            secrets: BTreeMap::new(),
            to_push: BTreeMap::new(),
            push_trust: Default::default(),
            no_cache: false,
        }
    }

    /// Sets whether the image is of use to later builds.
    pub(crate) fn with_no_cache(self, no_cache: bool) -> Self {
        Self { no_cache, ..self }
    }

    fn command(&self, verb: &str) -> Command {
        let mut command = Children::command(Path::new("buildah"), &self.work);
        command.env("CONTAINERS_REGISTRIES_CONF", self.work.join("registries.conf"));
        self.storage().use_by(&mut command);
        command.arg(verb);
        command
    }

    /// A command that speaks to registries.
    fn remote_command(&self, verb: &str, credentials: &str) -> Command {
        let mut command = self.command(verb);
        command
            .arg("--signature-policy")
            .arg(self.work.join("policy.json"))
            .arg("--authfile")
            .arg(self.work.join(credentials))
            .args(["--retry", "2", "--retry-delay", "1s"]);
        command
    }

    fn build_command(&self, request: &BuildRequest) -> Result<Command, ToolError> {
        let mut command = self.remote_command("build", TO_PULL);
        command
            .args([
                "--isolation",
                &self.settings.isolation,
                "--pull-always",
                "--force-rm",
                "--format",
                "docker",
            ])
            .arg(if request.no_cache { "--no-cache" } else { "--layers" })
            .arg("--hooks-dir")
            .arg(self.work.join("hooks"))
            .arg("--iidfile")
            .arg(self.work.join("image-id"))
            .arg("--file")
            .arg(&request.dockerfile);
        if !request.target.is_empty() {
            command.arg("--target").arg(&request.target);
        }
        for (name, value) in &request.build_args {
            let argument = format!("{name}={value}");
            check_argument(name, &argument)?;
            command.arg("--build-arg").arg(argument);
        }
        for (id, file) in secret_files::mounts(&self.secrets, &self.work).map_err(ToolError::Failed)? {
            command.arg("--secret").arg(format!("id={id},src={}", file.display()));
        }
        command.arg("--").arg(&request.context);
        Ok(command)
    }

    /// The containers that this run's builds left behind.
    fn leftover_containers(&self) -> BTreeSet<String> {
        let Some(run) = self.work.parent() else { return BTreeSet::new() };
        let (Some(runs), Some(name)) = (run.parent(), run.file_name()) else { return BTreeSet::new() };
        let storage = self.storage();
        let containers = storage.containers(runs).into_iter();
        let marked = containers.filter(|(_, run)| name == run.as_str()).map(|(container, _)| container);
        let begun = std::fs::read_to_string(self.work.join(REMOVING)).unwrap_or_default();
        let begun = begun.lines().filter(|container| storage.has(container)).map(str::to_owned);
        marked.chain(begun).collect()
    }

    /// Removes what a builder left that died: also the container that its buildah had made, and not yet noted whose it is.
    pub(crate) async fn clear_after_death(&self) -> bool {
        let storage = self.storage();
        // Those of buildahs that live are noted, or gone, within milliseconds.
        let (mut nobodys, since) = (storage.unnoted(), Instant::now());
        while !nobodys.is_empty() && since.elapsed() < NOTED_WITHIN {
            tokio::time::sleep(LOOK).await;
            let unnoted = storage.unnoted();
            nobodys.retain(|container| unnoted.contains(container));
        }
        nobodys.extend(self.leftover_containers());
        self.remove_containers(nobodys).await
    }

    /// Whether none is left.
    async fn remove_containers(&self, containers: BTreeSet<String>) -> bool {
        if !containers.is_empty() {
            let containers: Vec<String> = containers.into_iter().collect();
            if write_private(&self.work.join(REMOVING), containers.join("\n").as_bytes()).is_err() {
                return false;
            }
            let mut command = self.command("rm");
            command.args(&containers);
            let _ = self.children.run(command, Show::Nothing).await;
            self.storage().remove_forgotten(&containers);
        }
        self.leftover_containers().is_empty()
    }

    fn storage(&self) -> Storage {
        Storage::of(&self.settings)
    }
}

#[async_trait]
impl BuildTool for Buildah {
    fn name(&self) -> &'static str {
        "buildah"
    }

    async fn build(&self, request: &BuildRequest) -> Result<Built, ToolError> {
        refuse_what_it_cannot(request)?;
        let output = self.children.output();
        output.restart_steps();
        let memory = Memory::new();
        let ended = self.children.run(self.build_command(request)?, Show::Steps).await.map_err(cannot_run)?;
        output.end_steps();
        if !ended.status.success() {
            let work = self.work.display().to_string();
            return Err(failure::of_build(&ended, &work, output.last_step().as_ref(), memory.exhausted()));
        }
        let image = std::fs::read_to_string(self.work.join("image-id")).map_err(cannot_run)?;
        Ok(Built { image: image.trim().to_owned() })
    }

    async fn push(&self, built: &Built, to: &ImageReference) -> Result<Digest, ToolError> {
        let digest_file = self.work.join("pushed-digest");
        // Only now, when no step can be at work that could read it.
        let (registry, registries) = &self.push_trust;
        files::trust(&trusted(&self.work), registries, registry).map_err(cannot_run)?;
        let credentials = self.work.join(TO_PUSH);
        write_private(&credentials, secret_files::registry_logins(&self.to_push).as_bytes())
            .map_err(cannot_run)?;
        let mut command = self.remote_command("push", TO_PUSH);
        command
            .arg("--digestfile")
            .arg(&digest_file)
            .arg("--")
            .arg(&built.image)
            .arg(format!("docker://{to}"));
        let ended = self.children.run(command, Show::Output).await.map_err(cannot_run);
        std::fs::remove_file(&credentials).map_err(cannot_run)?;
        let ended = ended?;
        if !ended.status.success() {
            return Err(failure::of_push(&ended, to));
        }
        let digest = std::fs::read_to_string(&digest_file).map_err(cannot_run)?;
        digest.trim().parse().map_err(|error| cannot_run(std::io::Error::other(error)))
    }

    async fn digest(&self, image: &ImageReference) -> Option<Digest> {
        let mut command = self.command("inspect");
        command.args(["--type", "image", "--format", "{{.FromImageDigest}}", "--"]).arg(image.to_string());
        let ended = self.children.run(command, Show::Nothing).await.ok()?;
        ended.tail.trim().parse().ok()
    }

    async fn clear(&self, built: Option<&Built>) -> bool {
        let cleared = self.remove_containers(self.leftover_containers()).await;
        if let Some(built) = built.filter(|_| self.no_cache) {
            let mut command = self.command("rmi");
            command.arg(&built.image);
            // It may serve another build at the moment.
            let _ = self.children.run(command, Show::Nothing).await;
        }
        cleared
    }
}

/// Writes into the work folder how the registries are reached that are pulled from.
pub(crate) fn tell_registries(work: &Path, ways: &Ways<'_>) -> std::io::Result<()> {
    std::fs::write(work.join("registries.conf"), files::registries(ways))?;
    std::fs::write(work.join("policy.json"), files::POLICY)?;
    ways.pulled_from.iter().try_for_each(|registry| files::trust(&trusted(work), ways.registries, registry))
}

/// Where buildah looks for the certificates of registries, each in a folder of its name.
fn trusted(work: &Path) -> PathBuf {
    home(work).join(".config/containers/certs.d")
}

/// What buildah would read as something else is refused by its name.
fn refuse_what_it_cannot(request: &BuildRequest) -> Result<(), ToolError> {
    if let Some(other) = request.platforms.iter().find(|platform| **platform != Platform::default()) {
        let message =
            format!("buildah builds for {} alone, not for {other}: that takes BuildKit", Platform::default());
        return Err(ToolError::Failed(Failure::new(FailureReason::Dockerfile, message)));
    }
    for (what, asked) in
        [("provenance", request.provenance), ("reproducible images", request.source_date_epoch.is_some())]
    {
        if asked {
            let message = format!("buildah makes no {what}: that takes BuildKit");
            return Err(ToolError::Failed(Failure::new(FailureReason::Dockerfile, message)));
        }
    }
    let text = std::fs::read(&request.dockerfile).map_err(cannot_run)?;
    match refusal::what_it_cannot(&String::from_utf8_lossy(&text)) {
        Some(what) => Err(ToolError::Failed(Failure::new(
            FailureReason::Dockerfile,
            format!("the Dockerfile has {what}, which buildah does not know: it takes BuildKit"),
        ))),
        None => Ok(()),
    }
}

fn cannot_run(error: std::io::Error) -> ToolError {
    ToolError::Failed(Failure::new(FailureReason::Internal, format!("cannot run buildah: {error}")))
}
