//! What a builder needs to be tested: repositories to build from, a registry to push to, a place for layers, and the
//! program itself.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use kiln_domain::id::{BuildId, ImageKey, RunId};
use kiln_domain::layer_cache::LayerCache;
use kiln_domain::reference::{Digest, ImageReference};
use kiln_domain::registries::Registries;
use kiln_domain::run::{RunSpec, Work};
use kiln_domain::run_folder::{Builder, Settings};
use kiln_domain::source::DockerfileSource;
use tempfile::TempDir;

use crate::registry::DockerRegistry;

/// A registry, and a folder for repositories, runs and layers. All of it goes with it.
pub struct Workshop {
    pub registry: DockerRegistry,
    /// How builders reach registries.
    pub registries: Registries,
    folder: TempDir,
    made: AtomicU64,
    builder: Builder,
    layer_cache: LayerCache,
}

/// A repository with one commit.
#[derive(Clone, Debug)]
pub struct Repository {
    pub path: PathBuf,
    /// `file://…`
    pub uri: String,
    pub commit: String,
}

impl Workshop {
    pub async fn new() -> Result<Self> {
        Self::with(DockerRegistry::start().await?)
    }

    /// One that pushes to this registry.
    pub fn with(registry: DockerRegistry) -> Result<Self> {
        let folder = TempDir::with_prefix("kiln-workshop-")?;
        Ok(Self {
            registry,
            registries: Registries::default(),
            folder,
            made: AtomicU64::new(0),
            builder: Builder::Buildah,
            layer_cache: LayerCache { enabled: false, ..LayerCache::default() },
        })
    }

    /// The same with another build tool than buildah.
    pub fn using(mut self, builder: Builder) -> Self {
        self.builder = builder;
        self
    }

    /// The same with layers kept in a registry, which else they aren't.
    pub fn keeping_layers(mut self, layer_cache: LayerCache) -> Self {
        self.layer_cache = layer_cache;
        self
    }

    /// Ends BuildKit's daemon, if there is one, and removes all layers that it kept.
    pub fn forget_layers(&self) -> Result<()> {
        end_buildkit(&self.storage());
        match std::fs::remove_dir_all(self.storage().join("buildkit")) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
            _ => Ok(()),
        }
    }

    /// The log of what brings layers into the registry; empty where none did yet.
    pub fn exports(&self) -> String {
        std::fs::read_to_string(self.storage().join("layer-cache/exports.log")).unwrap_or_default()
    }

    /// What waits to be brought into the registry, or is being.
    pub fn exporting(&self) -> Result<usize> {
        let folder = self.storage().join("layer-cache");
        let entries =
            if folder.exists() { std::fs::read_dir(folder)?.flatten().collect() } else { Vec::new() };
        Ok(entries.iter().filter(|entry| entry.path().is_dir()).count())
    }

    /// One whose builds are done by BuildKit; none where that isn't there, which is said on standard error.
    pub async fn with_buildkit(
        missing: impl FnOnce(&Settings) -> Option<&'static str>,
    ) -> Result<Option<Self>> {
        let workshop = Self::new().await?.using(Builder::Buildkit);
        match missing(&workshop.settings()) {
            None => Ok(Some(workshop)),
            Some(program) => {
                eprintln!("left out: {program} is not here; `scripts/bootstrap --buildkit` brings BuildKit");
                Ok(None)
            }
        }
    }

    /// A repository with these files, and the static `busybox` in its root and in each folder named in `busybox_in`.
    pub fn repository(&self, files: &[(&str, &str)], busybox_in: &[&str]) -> Result<Repository> {
        self.repository_prepared(files, |path| {
            busybox_in.iter().try_for_each(|folder| {
                let copied = std::fs::copy("/bin/busybox", path.join(folder).join("busybox"));
                copied.map(drop).context("busybox-static is missing")
            })
        })
    }

    /// A repository with these files, and what `prepare` does in its folder.
    pub fn repository_prepared(
        &self,
        files: &[(&str, &str)],
        prepare: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<Repository> {
        let path = self.folder.path().join(format!("repository-{}", self.next()));
        std::fs::create_dir_all(&path)?;
        for (name, content) in files {
            let file = path.join(name);
            std::fs::create_dir_all(file.parent().context("a file without a folder")?)?;
            std::fs::write(file, content)?;
        }
        prepare(&path)?;
        git(&path, &["init", "--quiet", "--initial-branch", "main"])?;
        let mut repository =
            Repository { uri: format!("file://{}", path.display()), path, commit: String::new() };
        repository.commit = repository.commit_all()?;
        Ok(repository)
    }

    /// A run that builds what `change` makes of `repository`'s Dockerfile.
    pub fn build(
        &self,
        repository: &Repository,
        change: impl FnOnce(&mut DockerfileSource),
    ) -> Result<RunSpec> {
        let mut source = DockerfileSource {
            remote_uri: repository.uri.clone(),
            revision: String::new(),
            path: String::new(),
            context_path: String::new(),
            version: String::new(),
            build_args: BTreeMap::new(),
            target: String::new(),
            checkout_location: None,
            platform: None,
            platforms: Vec::new(),
            provenance: false,
            reproducible: false,
            unknown: BTreeMap::new(),
        };
        change(&mut source);
        let base_ref = self.registry.reference(&format!("base:{}", self.next()))?;
        self.spec(Work::Build { source, commit: repository.commit.clone(), base_ref })
    }

    /// A run of this work, with a target of its own.
    pub fn spec(&self, work: Work) -> Result<RunSpec> {
        let target_ref = self.registry.reference(&format!("workspace:{}", self.next()))?;
        let mut entropy = [0; 10];
        entropy.copy_from_slice(format!("{:010}", self.next()).as_bytes());
        let build = BuildId::new(&ImageKey::of(&target_ref.to_string()), entropy);
        Ok(RunSpec {
            run: RunId::new(&build, 1),
            work,
            target_ref,
            owner: "ann".into(),
            timeout_ms: 60_000,
            no_cache: false,
            plain_http: Vec::new(),
            file_remotes: true,
            traceparent: String::new(),
        })
    }

    /// The folder for runs.
    pub fn runs(&self) -> PathBuf {
        self.folder.path().join("runs")
    }

    pub fn settings(&self) -> Settings {
        let mut settings = Settings::new(self.storage());
        settings.builder = self.builder;
        settings.registries.clone_from(&self.registries);
        settings.programs = tools_folder();
        settings.buildkit.idle_seconds = 60;
        settings.layer_cache.clone_from(&self.layer_cache);
        settings
    }

    /// Where build tools keep what they do.
    pub fn storage(&self) -> PathBuf {
        self.folder.path().join("storage")
    }

    /// What is at a reference in the registry.
    pub async fn pushed(&self, reference: &ImageReference) -> Result<Option<Digest>> {
        let manifest = self.registry.manifest(reference.repository(), reference.selector()).await?;
        Ok(manifest.map(|(_, content)| Digest::of(&content)))
    }

    /// What a run left on this host but its revocation: processes, files, and (of any run here) containers and mounts.
    pub fn left(&self, run: &RunId) -> Result<Vec<String>> {
        let folder = self.runs().join(run.as_str());
        let mut left = self.processes(run)?;
        if folder.exists() {
            for entry in std::fs::read_dir(&folder)? {
                left.push(entry?.path().display().to_string());
            }
        }
        left.retain(|path| !path.ends_with("/revoked"));
        let mounts = mounts_under(self.folder.path())?;
        left.extend(mounts.into_iter().filter(|mount| mount.ends_with("/merged")));
        let containers = self.folder.path().join("storage/buildah/root/overlay-containers");
        if containers.exists() {
            for entry in std::fs::read_dir(containers)? {
                let entry = entry?;
                if entry.file_type()?.is_dir() {
                    left.push(format!("container {}", entry.file_name().display()));
                }
            }
        }
        Ok(left)
    }

    /// The processes that have one of the run's files open or work in its folder.
    pub fn processes(&self, run: &RunId) -> Result<Vec<String>> {
        let folder = self.runs().join(run.as_str());
        let in_folder = |link: PathBuf| std::fs::read_link(link).is_ok_and(|path| path.starts_with(&folder));
        let mut found = Vec::new();
        for process in std::fs::read_dir("/proc")?.flatten() {
            let path = process.path();
            let of_number = process
                .file_name()
                .to_string_lossy()
                .parse::<u32>()
                .is_ok_and(|pid| pid != std::process::id());
            if !of_number {
                continue;
            }
            let open = std::fs::read_dir(path.join("fd")).into_iter().flatten().flatten();
            if in_folder(path.join("cwd")) || open.into_iter().any(|descriptor| in_folder(descriptor.path()))
            {
                let name = std::fs::read_to_string(path.join("comm")).unwrap_or_default();
                found.push(format!("{} {}", process.file_name().display(), name.trim()));
            }
        }
        Ok(found)
    }

    fn next(&self) -> u64 {
        self.made.fetch_add(1, Ordering::Relaxed)
    }
}

impl Drop for Workshop {
    fn drop(&mut self) {
        end_buildkit(&self.storage());
        // buildah leaves its storage mounted on itself, and a test that failed leaves more.
        for mount in mounts_under(self.folder.path()).unwrap_or_default().iter().rev() {
            let _ = Command::new("umount").args(["--lazy", mount]).stderr(Stdio::null()).status();
        }
    }
}

impl Repository {
    /// Commits all that changed; the commit.
    pub fn commit_all(&self) -> Result<String> {
        git(&self.path, &["add", "--all"])?;
        git(&self.path, &["commit", "--quiet", "--allow-empty", "--message", "test"])?;
        git(&self.path, &["rev-parse", "HEAD"])
    }
}

/// Runs git in a repository, without the host's configuration; what it wrote.
pub fn git(repository: &Path, arguments: &[&str]) -> Result<String> {
    let identity =
        ["-c", "user.name=test", "-c", "user.email=test@example.com", "-c", "commit.gpgSign=false"];
    let output = Command::new("git")
        .current_dir(repository)
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .args(identity)
        .args(arguments)
        .output()
        .context("git is missing")?;
    ensure!(output.status.success(), "git {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

/// Ends the BuildKit daemon that keeps its layers in `storage`, where there is one: its keeper ends it with what it was told.
pub(crate) fn end_buildkit(storage: &Path) {
    let folder = storage.join("buildkit");
    if std::fs::remove_file(folder.join("settings.json")).is_err() {
        return;
    }
    let Ok(lock) = std::fs::File::open(folder.join("keeper.lock")) else { return };
    for _ in 0..400 {
        if rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockShared).is_ok() {
            break;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Where `scripts/bootstrap` puts programs.
#[expect(clippy::disallowed_methods, reason = "where a tool lies is the environment's to say")]
pub fn tools_folder() -> Option<PathBuf> {
    let folder = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let cache = folder("XDG_CACHE_HOME").or_else(|| Some(folder("HOME")?.join(".cache")))?;
    Some(cache.join("kiln/tools/bin"))
}

/// The program to give to an engine: the builder by itself, an example of crate kiln-builder, compiled now if need be.
pub fn builder_program() -> Result<PathBuf> {
    static PROGRAM: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let built = PROGRAM.get_or_init(|| build_program().map_err(|error| format!("{error:#}")));
    built.clone().map_err(anyhow::Error::msg)
}

fn build_program() -> Result<PathBuf> {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).context("no workspace")?;
    let built = Command::new(env!("CARGO"))
        .args(["build", "--package", "kiln-builder", "--example", "builder", "--message-format", "json"])
        .current_dir(workspace)
        .stderr(Stdio::inherit())
        .output()?;
    ensure!(built.status.success(), "kiln-builder does not compile");
    let lines = String::from_utf8(built.stdout)?;
    let executable = lines.lines().rev().find_map(|line| {
        let message: serde_json::Value = serde_json::from_str(line).ok()?;
        Some(PathBuf::from(message.get("executable")?.as_str()?))
    });
    executable.context("cargo names no executable")
}

/// Waits until a condition holds.
pub async fn until(what: &str, mut condition: impl FnMut() -> Result<bool>) -> Result<()> {
    let waiting = async {
        while !condition()? {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(())
    };
    tokio::time::timeout(Duration::from_secs(60), waiting).await.with_context(|| format!("never: {what}"))?
}

fn mounts_under(folder: &Path) -> Result<Vec<String>> {
    let text = std::fs::read_to_string("/proc/self/mountinfo")?;
    let points = text.lines().filter_map(|line| line.split(' ').nth(4));
    Ok(points.filter(|point| Path::new(point).starts_with(folder)).map(str::to_owned).collect())
}
