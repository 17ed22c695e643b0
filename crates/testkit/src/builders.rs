//! Workspaces that really build: each runs a builder, whose output is the workspace's terminal, and pushes to a real
//! registry. What is built is read from the request, as Gitpod's bob reads it.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result, bail, ensure};
use async_trait::async_trait;
use kiln_domain::platform::Platform;
use kiln_domain::run::{Outcome, RunResult, RunSecrets, RunSpec, Work as RunWork};
use kiln_domain::run_folder::{self, Builder, SecretsFile, Settings};
use kiln_domain::source::DockerfileSource;
use kiln_proto::contentservice as content;
use kiln_proto::contentservice::workspace_initializer::Spec;
use kiln_proto::wsman::StartWorkspaceRequest;
use rustix::process::{Pid, Signal, kill_process_group};
use tempfile::TempDir;

use crate::ws_manager::{Work, Workspace};

/// What workspaces do that build.
pub struct Builders {
    program: PathBuf,
    folder: TempDir,
}

impl Builders {
    /// `program` is a `kiln`.
    pub fn new(program: &Path) -> Result<Self> {
        Ok(Self { program: program.to_owned(), folder: TempDir::with_prefix("kiln-workspaces-")? })
    }

    fn begin(&self, request: &StartWorkspaceRequest) -> Result<(PathBuf, Running, std::io::PipeReader)> {
        let (spec, secrets) = read(request)?;
        let folder = self.folder.path().join(&request.id);
        std::fs::create_dir_all(&folder)?;
        let mut settings = Settings::new(self.folder.path().join("layers"));
        settings.builder = Builder::Buildah;
        let secrets = SecretsFile::from(&secrets);
        for (name, text) in [
            (run_folder::SPEC, serde_json::to_string(&spec)?),
            (run_folder::SECRETS, serde_json::to_string(&secrets)?),
            (run_folder::SETTINGS, serde_json::to_string(&settings)?),
        ] {
            std::fs::write(folder.join(name), text)?;
        }
        // The builder takes the lock from its standard input.
        let lock = std::fs::File::create(folder.join(run_folder::LOCK))?;
        rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive)?;
        let (output, writer) = std::io::pipe()?;
        let child = Command::new(&self.program)
            .args(["builder", "--run-dir"])
            .arg(&folder)
            .current_dir(&folder)
            .process_group(0)
            .stdin(lock)
            .stdout(writer.try_clone()?)
            .stderr(writer)
            .spawn()
            .context("start a builder")?;
        Ok((folder, Running(child), output))
    }
}

#[async_trait]
impl Work for Builders {
    async fn build(&self, workspace: &Workspace) -> Result<(), String> {
        let begun = self.begin(&workspace.request).map_err(|error| format!("{error:#}"))?;
        let (folder, _running, mut output) = begun;
        let terminal = workspace.terminal();
        let copying = tokio::task::spawn_blocking(move || {
            let mut piece = [0; 4096];
            while let Ok(count @ 1..) = output.read(&mut piece) {
                terminal.write(piece.get(..count).unwrap_or_default());
            }
        });
        copying.await.map_err(|error| error.to_string())?;
        let outcome = std::fs::read(folder.join(run_folder::OUTCOME)).map_err(|error| error.to_string())?;
        match serde_json::from_slice::<Outcome>(&outcome).map_err(|error| error.to_string())?.result {
            RunResult::Pushed(_) => Ok(()),
            RunResult::Failed(failure) => Err(failure.message),
        }
    }
}

impl Drop for Builders {
    fn drop(&mut self) {
        crate::installation::unmount_under(self.folder.path());
    }
}

/// A builder with all that it started; killed with the workspace.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(pid) = i32::try_from(self.0.id()).ok().and_then(Pid::from_raw) {
            // Mostly it has ended.
            let _ = kill_process_group(pid, Signal::KILL);
        }
        let _ = self.0.wait();
    }
}

/// What a workspace is asked to build.
fn read(request: &StartWorkspaceRequest) -> Result<(RunSpec, RunSecrets)> {
    let spec = request.spec.as_ref().context("no spec")?;
    let variables: BTreeMap<&str, &str> =
        spec.envvars.iter().map(|variable| (variable.name.as_str(), variable.value.as_str())).collect();
    let variable = |name: &str| variables.get(name).copied().with_context(|| format!("{name} is not set"));
    let in_workspace = |name: &str| -> Result<String> {
        let path = variable(name)?.strip_prefix("/workspace").context("a path outside of the workspace")?;
        Ok(path.trim_start_matches('/').to_owned())
    };
    let base_ref = variable("WORKSPACEKIT_BOBPROXY_BASEREF")?.parse()?;
    let mut secrets = RunSecrets::default();
    let logins: BTreeMap<String, BTreeMap<String, String>> =
        serde_json::from_str(variable("WORKSPACEKIT_BOBPROXY_ADDITIONALAUTH")?)?;
    for (host, login) in logins {
        let part = |name: &str| login.get(name).map(String::as_str).unwrap_or_default();
        let pair = format!("{}:{}", part("username"), part("password"));
        secrets.push.insert(host.clone(), pair.clone().into());
        secrets.registries.insert(host, pair.into());
    }
    let work = if variable("BOB_BUILD_BASE")? == "true" {
        let Some(Spec::Git(git)) = spec.initializer.as_ref().and_then(|all| all.spec.as_ref()) else {
            bail!("no git initializer")
        };
        if let Some(config) = &git.config {
            secrets.git_username.clone_from(&config.auth_user);
            secrets.git_password = Some(config.auth_password.clone().into());
        }
        let source = DockerfileSource {
            remote_uri: git.remote_uri.clone(),
            path: in_workspace("BOB_DOCKERFILE_PATH")?,
            context_path: in_workspace("BOB_CONTEXT_DIR")?,
            checkout_location: Some(git.checkout_location.clone()),
            ..DockerfileSource::default()
        };
        RunWork::Build { source, commit: commit(git)?, base_ref }
    } else {
        RunWork::Copy { from: base_ref, platform: Some(Platform::default()) }
    };
    let spec = RunSpec {
        run: request.id.parse()?,
        work,
        target_ref: variable("WORKSPACEKIT_BOBPROXY_TARGETREF")?.parse()?,
        owner: request.metadata.as_ref().map(|metadata| metadata.owner.clone()).unwrap_or_default(),
        timeout_ms: 600_000,
        no_cache: false,
        plain_http: Vec::new(),
        file_remotes: true,
        traceparent: String::new(),
    };
    Ok((spec, secrets))
}

/// What an initializer would check out.
fn commit(git: &content::GitInitializer) -> Result<String> {
    let revision = match git.target_mode() {
        content::CloneTargetMode::RemoteHead => "HEAD".to_owned(),
        content::CloneTargetMode::RemoteBranch => format!("refs/heads/{}", git.clone_taget),
        content::CloneTargetMode::RemoteCommit => return Ok(git.clone_taget.clone()),
        content::CloneTargetMode::LocalBranch => bail!("a local branch"),
    };
    let output =
        Command::new("git").args(["ls-remote", &git.remote_uri, &revision]).stdin(Stdio::null()).output()?;
    ensure!(output.status.success(), "git: {}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout)?;
    Ok(text.split_whitespace().next().context("there is no such revision")?.to_owned())
}
