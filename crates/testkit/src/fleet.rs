//! Kiln's roles as processes of their own, some of them twice, on a real nats-server and a real registry.

use std::collections::BTreeSet;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use kiln_proto::builder::image_builder_client::ImageBuilderClient;
use kiln_proto::kiln_v1::builds_client::BuildsClient;
use tempfile::TempDir;
use tonic::transport::Channel;

use crate::nats::{self, NatsServer};
use crate::process::Process;
use crate::registry::DockerRegistry;

const SOON: Duration = Duration::from_secs(60);
/// Shorter than a user's, so that a test of a take-over needn't wait for half a minute.
const LEASE_SECONDS: u64 = 6;

/// A fleet of role processes on this host. They are killed on drop.
pub struct Fleet {
    program: PathBuf,
    pub nats: NatsServer,
    registry: String,
    seed: String,
    folder: TempDir,
    /// Where the ws-manager is, if builders are workspaces.
    ws_manager: Option<String>,
    pub processes: Vec<Process>,
}

impl Fleet {
    /// Starts a process for each of `roles` and waits until all are ready. `seed` is the installation's seal key.
    pub async fn start(
        program: &Path,
        registry: &DockerRegistry,
        seed: &str,
        roles: &[&'static str],
    ) -> Result<Self> {
        Self::begin(program, registry, seed, roles, None).await
    }

    /// One whose builders are workspaces of the ws-manager at `address`, `host:port`.
    pub async fn start_on_ws_manager(
        program: &Path,
        registry: &DockerRegistry,
        seed: &str,
        roles: &[&'static str],
        address: &str,
    ) -> Result<Self> {
        Self::begin(program, registry, seed, roles, Some(address.to_owned())).await
    }

    async fn begin(
        program: &Path,
        registry: &DockerRegistry,
        seed: &str,
        roles: &[&'static str],
        ws_manager: Option<String>,
    ) -> Result<Self> {
        let mut fleet = Self {
            program: program.to_owned(),
            nats: nats::run_server().await?,
            registry: registry.address().to_owned(),
            seed: seed.to_owned(),
            folder: TempDir::with_prefix("kiln-fleet-")?,
            ws_manager,
            processes: Vec::new(),
        };
        for role in roles {
            fleet.add(role).await?;
        }
        for process in &mut fleet.processes {
            process.ready().await?;
        }
        Ok(fleet)
    }

    /// Starts one more process; it is not waited for.
    pub async fn add(&mut self, role: &'static str) -> Result<()> {
        let settings = Settings {
            nats: &self.nats.url(),
            registry: &self.registry,
            seal_seed: &self.seed,
            engine: &self.folder.path().join("engine"),
        };
        let stderr = self.folder.path().join("stderr.log");
        let mut environment = settings.environment();
        environment.push(("KILN_HOLDERS__LEASE_SECONDS".into(), LEASE_SECONDS.to_string()));
        if let Some(address) = &self.ws_manager {
            // An installation has one engine.
            environment.retain(|(name, _)| !name.starts_with("KILN_ENGINE__LOCAL"));
            environment.push(("KILN_ENGINE__WS_MANAGER__ADDRESS".into(), address.clone()));
            environment.push(("KILN_ENGINE__WS_MANAGER__BUILDER_IMAGE".into(), "registry.test/bob:1".into()));
            environment.push(("KILN_ORCHESTRATOR__SLOTS".into(), "100".into()));
        }
        let mut process = Process::new(&self.program, role, &stderr, environment)?;
        process.start()?;
        self.processes.push(process);
        Ok(())
    }

    /// The local engine's folder of runs.
    pub fn runs(&self) -> PathBuf {
        self.folder.path().join("engine/runs")
    }

    /// A client of a gateway, in the API of image-builder-mk3.
    pub async fn image_builder(&self) -> Result<ImageBuilderClient<Channel>> {
        let gateway = self.process("gateway", 0)?;
        let channel = Channel::from_shared(format!("http://{}", gateway.grpc()))?.connect().await?;
        Ok(ImageBuilderClient::new(channel))
    }

    /// A client of each gateway.
    pub async fn clients(&self) -> Result<Vec<BuildsClient<Channel>>> {
        let mut clients = Vec::new();
        for gateway in self.processes.iter().filter(|process| process.role == "gateway") {
            let channel = Channel::from_shared(format!("http://{}", gateway.grpc()))?.connect().await?;
            clients.push(BuildsClient::new(channel));
        }
        Ok(clients)
    }

    /// SIGKILL to the process of a role that runs, the first of several.
    pub async fn kill(&mut self, role: &str) -> Result<()> {
        let at = self.processes.iter().position(|process| process.role == role).context("no such process")?;
        self.processes.remove(at).kill().await
    }

    /// The `nth` process of a role, from 0.
    pub fn process(&self, role: &str, nth: usize) -> Result<&Process> {
        self.processes.iter().filter(|process| process.role == role).nth(nth).context("no such process")
    }

    /// Waits until one of them has said this on standard error.
    pub async fn said(&self, text: &str) -> Result<()> {
        let said = async {
            while !self.log().contains(text) {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        tokio::time::timeout(SOON, said)
            .await
            .with_context(|| format!("nobody says `{text}`: {}", self.log()))
    }

    /// What all of them said on standard error.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("stderr.log")).unwrap_or_default()
    }
}

/// What all roles of an installation must agree on.
pub struct Settings<'a> {
    /// `nats://host:port`, or several with commas between.
    pub nats: &'a str,
    /// `host:port`.
    pub registry: &'a str,
    pub seal_seed: &'a str,
    /// The local engine's folder.
    pub engine: &'a Path,
}

impl Settings<'_> {
    /// As a role's process takes them. `file://` remotes are admitted, and streams are small.
    pub fn environment(&self) -> Vec<(String, String)> {
        let mut environment = vec![
            ("KILN_LOG_FORMAT", "text".to_owned()),
            ("KILN_NATS__URL", self.nats.to_owned()),
            ("KILN_SEAL__SEED", self.seal_seed.to_owned()),
            ("KILN_ENGINE__LOCAL__FOLDER", self.engine.display().to_string()),
            // The same on every machine, whatever is installed there.
            ("KILN_ENGINE__LOCAL__BUILDER", "buildah".to_owned()),
            ("KILN_ORCHESTRATOR__BASE_IMAGE_REPOSITORY", format!("{}/base", self.registry)),
            ("KILN_ORCHESTRATOR__WORKSPACE_IMAGE_REPOSITORY", format!("{}/workspace", self.registry)),
        ];
        for stream in ["KILN_STREAMS__JOURNAL_MAX_BYTES", "KILN_STREAMS__LOGS_MAX_BYTES"] {
            environment.push((stream, (256 << 20).to_string()));
        }
        for role in
            ["KILN_ORCHESTRATOR__FILE_REMOTES", "KILN_RESOLVER__FILE_REMOTES", "KILN_GATEWAY__FILE_REMOTES"]
        {
            environment.push((role, "true".to_owned()));
        }
        environment.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
    }
}

/// Addresses on loopback that nobody listens on, for a process that must be told its ports. They lie below the ports that
/// the kernel gives to outgoing connections, one of which would else be there first now and then.
pub fn free_addresses<const N: usize>() -> Result<[SocketAddr; N]> {
    let addresses = free_ports(N)?.into_iter().map(|port| SocketAddr::from(([127, 0, 0, 1], port)));
    addresses.collect::<Vec<_>>().try_into().map_err(|_| anyhow::anyhow!("no free ports"))
}

/// The ports of as many addresses as [`free_addresses`] gives. None is given twice, as whoever has it may not listen yet.
pub(crate) fn free_ports(count: usize) -> Result<Vec<u16>> {
    static GIVEN: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());
    let mut given = GIVEN.lock().unwrap_or_else(PoisonError::into_inner);
    let mut ports = Vec::new();
    for _ in 0..10_000 {
        if ports.len() == count {
            break;
        }
        let port = rand::random_range(12_000..20_000);
        if TcpListener::bind(("127.0.0.1", port)).is_ok() && given.insert(port) {
            ports.push(port);
        }
    }
    ensure!(ports.len() == count, "no free ports");
    Ok(ports)
}

impl Drop for Fleet {
    fn drop(&mut self) {
        crate::installation::unmount_under(self.folder.path());
    }
}
