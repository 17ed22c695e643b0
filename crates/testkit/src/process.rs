//! One of Kiln's roles as a process, and what can be done to a process from outside.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use tokio::process::{Child, Command};

const SOON: Duration = Duration::from_secs(60);
/// How long it may take to say whether it is ready.
const ANSWER: Duration = Duration::from_secs(5);

/// A role's process. It keeps its addresses and its environment over every restart, and is killed on drop.
pub struct Process {
    pub role: &'static str,
    program: PathBuf,
    environment: Vec<(String, String)>,
    stderr: PathBuf,
    health: SocketAddr,
    metrics: SocketAddr,
    grpc: SocketAddr,
    client: reqwest::Client,
    child: Option<Child>,
}

impl Process {
    /// One that isn't started yet. What it says on standard error is appended to `stderr`.
    pub fn new(
        program: &Path,
        role: &'static str,
        stderr: &Path,
        environment: Vec<(String, String)>,
    ) -> Result<Self> {
        let [health, metrics, grpc] = crate::fleet::free_addresses()?;
        let mut process = Self {
            role,
            program: program.to_owned(),
            environment,
            stderr: stderr.to_owned(),
            health,
            metrics,
            grpc,
            client: crate::registry::plain_client()?,
            child: None,
        };
        for (name, address) in [("HEALTH", health), ("METRICS", metrics), ("GRPC", grpc)] {
            process.environment.push((format!("KILN_LISTEN__{name}"), address.to_string()));
        }
        Ok(process)
    }

    /// Starts it; it is not waited for.
    pub fn start(&mut self) -> Result<()> {
        ensure!(self.child.is_none(), "the {} runs already", self.role);
        let stderr = std::fs::File::options().create(true).append(true).open(&self.stderr)?;
        let mut command = Command::new(&self.program);
        // What a test is told itself is no configuration.
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.as_encoded_bytes().starts_with(b"KILN_"))
        {
            command.env_remove(name);
        }
        let child = command
            .arg(self.role)
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("start {}", self.role))?;
        self.child = Some(child);
        Ok(())
    }

    /// Where a gateway answers.
    pub fn grpc(&self) -> SocketAddr {
        self.grpc
    }

    /// Waits until it says that it is ready.
    pub async fn ready(&mut self) -> Result<()> {
        let ready = async {
            while !self.is_ready().await {
                if let Some(status) = self.ended()? {
                    let said = std::fs::read_to_string(&self.stderr).unwrap_or_default();
                    bail!("the {} ended at its start ({status}): {said}", self.role);
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            Ok(())
        };
        tokio::time::timeout(SOON, ready).await.with_context(|| format!("{:?}: not ready", self.stderr))?
    }

    /// Whether it says now that it is ready.
    pub async fn is_ready(&self) -> bool {
        let answer = self.client.get(format!("http://{}/ready", self.health)).timeout(ANSWER).send().await;
        answer.is_ok_and(|answer| answer.status().is_success())
    }

    /// What it counts, as text.
    pub async fn metrics(&self) -> Result<String> {
        let answer =
            self.client.get(format!("http://{}/metrics", self.metrics)).timeout(ANSWER).send().await?;
        Ok(answer.error_for_status()?.text().await?)
    }

    /// SIGKILL.
    pub async fn kill(&mut self) -> Result<()> {
        if let Some(mut child) = self.child.take() {
            child.kill().await?;
        }
        Ok(())
    }

    /// SIGTERM; the end is not waited for.
    pub fn ask_to_end(&self) -> Result<()> {
        self.signal(Signal::TERM)
    }

    /// SIGTERM, and waits for the end. One that doesn't end in time runs on.
    pub async fn terminate(&mut self, within: Duration) -> Result<ExitStatus> {
        self.ask_to_end()?;
        self.wait(within).await
    }

    /// Waits for the end of one that was asked to. One that doesn't end in time runs on.
    pub async fn wait(&mut self, within: Duration) -> Result<ExitStatus> {
        let child = self.child.as_mut().context("it does not run")?;
        let ended = tokio::time::timeout(within, child.wait()).await;
        let ended = ended.with_context(|| format!("the {} does not end on SIGTERM", self.role))?;
        self.child = None;
        Ok(ended?)
    }

    /// SIGSTOP: it answers nothing, and its connections stay.
    pub fn pause(&self) -> Result<()> {
        self.signal(Signal::STOP)
    }

    /// SIGCONT after [`Process::pause`].
    pub fn resume(&self) -> Result<()> {
        self.signal(Signal::CONT)
    }

    /// How it ended, if it did without having been killed or terminated here. It can then be started again.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        let Some(child) = self.child.as_mut() else { return Ok(None) };
        let status = child.try_wait()?;
        if status.is_some() {
            self.child = None;
        }
        Ok(status)
    }

    pub fn pid(&self) -> Result<Pid> {
        let pid = self.child.as_ref().and_then(Child::id);
        let pid = pid.and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?));
        pid.with_context(|| format!("the {} does not run", self.role))
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        kill_process(self.pid()?, signal).with_context(|| format!("signal the {}", self.role))
    }
}
