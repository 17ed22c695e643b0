//! Kiln's roles as processes of their own, some of them twice, on a real nats-server and a real registry.

use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use kiln_proto::kiln_v1::builds_client::BuildsClient;
use tempfile::TempDir;
use tokio::process::{Child, Command};
use tonic::transport::Channel;

use crate::nats::{self, NatsServer};
use crate::registry::DockerRegistry;

const SOON: Duration = Duration::from_secs(60);

/// A fleet of role processes on this host. They are killed on drop.
pub struct Fleet {
    program: PathBuf,
    pub nats: NatsServer,
    registry: String,
    seed: String,
    folder: TempDir,
    pub processes: Vec<Process>,
}

/// A role's process.
pub struct Process {
    pub role: &'static str,
    child: Child,
    health: SocketAddr,
    grpc: SocketAddr,
}

impl Fleet {
    /// Starts a process for each of `roles` and waits until all are ready. `seed` is the installation's seal key.
    pub async fn start(
        program: &Path,
        registry: &DockerRegistry,
        seed: &str,
        roles: &[&'static str],
    ) -> Result<Self> {
        let mut fleet = Self {
            program: program.to_owned(),
            nats: nats::run_server().await?,
            registry: registry.address().to_owned(),
            seed: seed.to_owned(),
            folder: TempDir::with_prefix("kiln-fleet-")?,
            processes: Vec::new(),
        };
        for role in roles {
            fleet.add(role).await?;
        }
        for process in &fleet.processes {
            process.ready().await.with_context(|| fleet.log())?;
        }
        Ok(fleet)
    }

    /// Starts one more process; it is not waited for.
    pub async fn add(&mut self, role: &'static str) -> Result<()> {
        let [health, metrics, grpc] = free_addresses()?;
        let stderr =
            std::fs::File::options().create(true).append(true).open(self.folder.path().join("stderr.log"))?;
        let child = Command::new(&self.program)
            .arg(role)
            .env("KILN_LOG_FORMAT", "text")
            .env("KILN_NATS__URL", self.nats.url())
            .env("KILN_SEAL__SEED", &self.seed)
            .env("KILN_ENGINE__LOCAL__FOLDER", self.folder.path().join("engine"))
            .env("KILN_STREAMS__JOURNAL_MAX_BYTES", (256 << 20).to_string())
            .env("KILN_STREAMS__LOGS_MAX_BYTES", (256 << 20).to_string())
            .env("KILN_ORCHESTRATOR__BASE_IMAGE_REPOSITORY", format!("{}/base", self.registry))
            .env("KILN_ORCHESTRATOR__WORKSPACE_IMAGE_REPOSITORY", format!("{}/workspace", self.registry))
            .env("KILN_ORCHESTRATOR__FILE_REMOTES", "true")
            .env("KILN_RESOLVER__FILE_REMOTES", "true")
            .env("KILN_GATEWAY__FILE_REMOTES", "true")
            .env("KILN_LISTEN__HEALTH", health.to_string())
            .env("KILN_LISTEN__METRICS", metrics.to_string())
            .env("KILN_LISTEN__GRPC", grpc.to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("start {role}"))?;
        self.processes.push(Process { role, child, health, grpc });
        Ok(())
    }

    /// The gRPC address of the first process of a role.
    pub fn address(&self, role: &str) -> Result<String> {
        let process = self.processes.iter().find(|process| process.role == role);
        Ok(process.with_context(|| format!("no {role} runs"))?.grpc.to_string())
    }

    /// A client of each gateway.
    pub async fn clients(&self) -> Result<Vec<BuildsClient<Channel>>> {
        let mut clients = Vec::new();
        for gateway in self.processes.iter().filter(|process| process.role == "gateway") {
            let channel = Channel::from_shared(format!("http://{}", gateway.grpc))?.connect().await?;
            clients.push(BuildsClient::new(channel));
        }
        Ok(clients)
    }

    /// SIGKILL to the process of a role that runs, the first of several.
    pub async fn kill(&mut self, role: &str) -> Result<()> {
        let at = self.processes.iter().position(|process| process.role == role).context("no such process")?;
        self.processes.remove(at).child.kill().await?;
        Ok(())
    }

    /// What all of them said on standard error.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("stderr.log")).unwrap_or_default()
    }
}

/// Addresses on loopback that nobody listens on, for a process that must be told its ports. They lie below the ports that
/// the kernel gives to outgoing connections, one of which would else be there first now and then.
pub fn free_addresses<const N: usize>() -> Result<[SocketAddr; N]> {
    let mut held = Vec::new();
    for _ in 0..10_000 {
        if held.len() == N {
            break;
        }
        let port = rand::random_range(12_000..20_000);
        held.extend(TcpListener::bind(("127.0.0.1", port)));
    }
    let addresses: Vec<SocketAddr> = held.iter().map(TcpListener::local_addr).collect::<Result<_, _>>()?;
    addresses.try_into().map_err(|_| anyhow::anyhow!("no free ports"))
}

impl Process {
    async fn ready(&self) -> Result<()> {
        let url = format!("http://{}/ready", self.health);
        let ready = async {
            loop {
                if reqwest::get(&url).await.is_ok_and(|answer| answer.status().is_success()) {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let ready = tokio::time::timeout(SOON, ready).await;
        ensure!(ready.is_ok(), "the {} is not ready", self.role);
        Ok(())
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        crate::installation::unmount_under(self.folder.path());
    }
}
