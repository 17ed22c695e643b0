//! A whole Kiln: `kiln up` as a child process on free ports and a data directory of its own, seen from outside.

use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use kiln_proto::kiln_v1 as api;
use kiln_proto::kiln_v1::builds_client::BuildsClient;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, Command};
use tonic::transport::Channel;

use crate::workshop::end_buildkit;

const SOON: Duration = Duration::from_secs(60);

/// A running `kiln up`. Its process is killed on drop, and with it its children; builders are waited for by nobody.
pub struct Installation {
    program: PathBuf,
    folder: TempDir,
    arguments: Vec<String>,
    environment: Vec<(String, String)>,
    child: Option<Child>,
}

/// The `kiln` program beside the test's own, built now if it isn't there. A full test run has built it.
pub fn program() -> Result<PathBuf> {
    let own = std::env::current_exe()?;
    // target/<profile>/deps/<test>
    let folder = own.parent().and_then(Path::parent).context("a test stands in target/<profile>/deps")?;
    let program = folder.join("kiln");
    if !program.exists() {
        let mut build = std::process::Command::new(env!("CARGO"));
        build.args(["build", "--package", "kiln"]);
        if folder.ends_with("release") {
            build.arg("--release");
        }
        ensure!(build.status()?.success(), "kiln does not compile");
    }
    Ok(program)
}

impl Installation {
    /// Starts one and waits until it is ready. `file://` remotes are admitted.
    pub async fn start(program: &Path, arguments: &[&str]) -> Result<Self> {
        Self::start_with(program, arguments, &[]).await
    }

    /// The same, with these variables in its environment.
    pub async fn start_with(
        program: &Path,
        arguments: &[&str],
        environment: &[(&str, &str)],
    ) -> Result<Self> {
        let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        let mut installation = Self {
            program: program.to_owned(),
            folder: TempDir::with_prefix("kiln-installation-")?,
            arguments: arguments.iter().map(ToString::to_string).collect(),
            environment: environment.iter().map(owned).collect(),
            child: None,
        };
        installation.start_again().await?;
        Ok(installation)
    }

    /// Starts it again on the same data directory.
    pub async fn start_again(&mut self) -> Result<()> {
        let stderr = std::fs::File::options().create(true).append(true).open(self.stderr())?;
        // The same on every machine, unless the test is about another.
        let named = self.arguments.iter().any(|argument| argument.starts_with("--builder"));
        let listeners = ["grpc", "registry", "nats", "health", "metrics"];
        let mut command = Command::new(&self.program);
        command
            .args(["up", "--allow-file-contexts", "--data-dir"])
            .arg(self.data())
            .args(listeners.map(|name| format!("--{name}-listen=127.0.0.1:0")))
            .args(&self.arguments)
            .args(if named { &[] as &[&str] } else { &["--builder=buildah"] })
            .env("KILN_LOG_FORMAT", "text")
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(stderr)
            .kill_on_drop(true);
        let mut child = command.spawn().context("start kiln")?;
        let stdout = child.stdout.take().context("its stdout")?;
        let mut lines = BufReader::new(stdout).lines();
        let ready = tokio::time::timeout(SOON, lines.next_line()).await;
        self.child = Some(child);
        match ready {
            Ok(Ok(Some(line))) if line.starts_with("kiln is ready") => Ok(()),
            other => bail!("kiln is not ready: {other:?}\n{}", self.log()),
        }
    }

    pub fn data(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    /// What it said on standard error so far, of every start.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.stderr()).unwrap_or_default()
    }

    fn stderr(&self) -> PathBuf {
        self.folder.path().join("stderr.log")
    }

    /// `grpc`, `registry`, `health`, `metrics` as `host:port`; `nats` as a URL with its user.
    pub fn endpoint(&self, name: &str) -> Result<String> {
        let endpoints: Value =
            serde_json::from_str(&std::fs::read_to_string(self.data().join("endpoints.json"))?)?;
        let endpoint = endpoints.get(name).and_then(Value::as_str);
        Ok(endpoint.with_context(|| format!("no endpoint {name}"))?.to_owned())
    }

    /// A client of its API.
    pub async fn client(&self) -> Result<BuildsClient<Channel>> {
        let channel = Channel::from_shared(format!("http://{}", self.endpoint("grpc")?))?.connect().await?;
        Ok(BuildsClient::new(channel).max_decoding_message_size(16 << 20))
    }

    /// Its process.
    pub fn pid(&self) -> Result<u32> {
        self.child.as_ref().and_then(Child::id).context("it does not run")
    }

    /// SIGKILL.
    pub async fn kill(&mut self) -> Result<()> {
        self.child.take().context("it does not run")?.kill().await?;
        Ok(())
    }

    /// SIGTERM, and waits for the end.
    pub async fn terminate(&mut self) -> Result<ExitStatus> {
        let mut child = self.child.take().context("it does not run")?;
        let pid = child.id().and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?)).context("a pid")?;
        kill_process(pid, Signal::TERM)?;
        Ok(tokio::time::timeout(SOON, child.wait()).await.context("it does not end")??)
    }

    /// Waits until a build is as wanted.
    pub async fn until(&self, id: &str, wanted: impl Fn(&api::Build) -> bool) -> Result<api::Build> {
        let mut client = self.client().await?;
        let request = api::WatchBuildRequest { id: id.to_owned() };
        let mut builds = client.watch_build(request).await?.into_inner();
        let mut last = None;
        let watch = async {
            while let Some(build) = builds.message().await? {
                if wanted(&build) {
                    return Ok(build);
                }
                last = Some(build);
            }
            bail!("the watch ended")
        };
        match tokio::time::timeout(SOON * 2, watch).await {
            Ok(Ok(build)) => Ok(build),
            other => bail!("{other:?}; the build stays at {last:?}\n{}", self.log()),
        }
    }

    /// A build's whole log, waited for to its end.
    pub async fn whole_log(&self, id: &str) -> Result<Vec<u8>> {
        let request = api::BuildLogsRequest { id: id.to_owned(), follow: true, start: None };
        let mut chunks = self.client().await?.build_logs(request).await?.into_inner();
        let mut log = Vec::new();
        let read = async {
            while let Some(chunk) = chunks.message().await? {
                ensure!(
                    chunk.offset == u64::try_from(log.len())?,
                    "a gap at {}: {}",
                    log.len(),
                    chunk.offset
                );
                log.extend_from_slice(&chunk.content);
                if chunk.complete {
                    return Ok(());
                }
            }
            bail!("the log ended without being complete")
        };
        let read = tokio::time::timeout(SOON * 2, read).await;
        match read {
            Ok(Ok(())) => Ok(log),
            other => bail!("{other:?} after {:?}\n{}", String::from_utf8_lossy(&log), self.log()),
        }
    }
}

impl Drop for Installation {
    fn drop(&mut self) {
        end_buildkit(&self.data().join("layers"));
        unmount_under(self.folder.path());
    }
}

/// Unmounts what buildah leaves mounted: its storage on itself.
pub(crate) fn unmount_under(folder: &Path) {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let points = mounts.lines().filter_map(|line| line.split(' ').nth(4));
    for point in points.filter(|point| Path::new(point).starts_with(folder)) {
        let _ = std::process::Command::new("umount").args(["--lazy", point]).stderr(Stdio::null()).status();
    }
}
