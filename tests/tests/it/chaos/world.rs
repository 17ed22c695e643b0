//! The processes that the run is about: three NATS servers, a registry, each role two or three times. Every connection
//! of a role to NATS, of all to the registry and of callers to gateways goes through a wire that can be cut.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, ensure};
use kiln_bus::seal::OpenKey;
use kiln_bus::{Bus, Connect};
use kiln_proto::kiln_v1::builds_client::BuildsClient;
use kiln_testkit::fleet::Settings;
use kiln_testkit::installation::program;
use kiln_testkit::nats::{self, NatsServer};
use kiln_testkit::process::Process;
use kiln_testkit::wire::Wire;
use kiln_testkit::workshop::Workshop;
use rustix::process::Pid;
use secrecy::ExposeSecret as _;
use tokio::sync::{Mutex, RwLock};
use tonic::transport::{Channel, Endpoint};

use super::sources::{Sources, path_with, play_buildah};

const ROLES: [&str; 10] = [
    "gateway",
    "gateway",
    "resolver",
    "resolver",
    "orchestrator",
    "orchestrator",
    "orchestrator",
    "log-relay",
    "log-relay",
    "cache-warmer",
];

/// Faults of the plan last longer now and then.
const LEASE_SECONDS: &str = "5";

/// How long a role may take to end when it is asked to.
const END: Duration = Duration::from_secs(60);

/// How long a role may take to be ready, the starts included that come to nothing.
const READY: Duration = Duration::from_secs(120);

pub(super) struct World {
    pub(super) sources: Sources,
    pub(super) workshop: Workshop,
    pub(super) registry_wire: Wire,
    /// Who has the lock does something to the process; nobody else then does.
    pub(super) nodes: Vec<Mutex<NatsServer>>,
    nodes_url: String,
    pub(super) roles: Vec<Role>,
    /// Held, shared, by whoever breaks what the roles need to reach the journal.
    pub(super) bus_faults: RwLock<()>,
    /// Roles that ended by themselves after they had been ready, or did not end when they were told to.
    pub(super) fallen: std::sync::Mutex<Vec<String>>,
    folder: PathBuf,
}

/// A role's process, with its wires.
pub(super) struct Role {
    pub(super) name: String,
    pub(super) process: Mutex<Process>,
    /// One to each NATS server.
    pub(super) bus: Vec<Wire>,
    /// From callers to a gateway.
    pub(super) callers: Option<Wire>,
}

impl World {
    /// Starts all of it. `folder` holds the engine's folder and what the roles say; it is the caller's to remove.
    pub(super) async fn start(folder: &Path) -> Result<Self> {
        let (workshop, cluster) = tokio::try_join!(Workshop::new(), nats::run_hidden_cluster(3))?;
        let registry_wire = Wire::to(workshop.registry.address()).await?;
        play_buildah(&folder.join("bin"), &workshop.registry).await?;
        let nodes_url = cluster.nodes.iter().map(NatsServer::url).collect::<Vec<_>>().join(",");
        let seed = OpenKey::new_seed()?;
        let path = path_with(&folder.join("bin"))?;
        let mut roles = Vec::new();
        for (number, role) in ROLES.into_iter().enumerate() {
            let mut bus = Vec::new();
            for node in &cluster.nodes {
                bus.push(Wire::to(&node.address()).await?);
            }
            let nats: Vec<_> = bus.iter().map(|wire| format!("nats://{}", wire.address())).collect();
            let settings = Settings {
                nats: &nats.join(","),
                registry: registry_wire.address(),
                seal_seed: seed.expose_secret(),
                engine: &folder.join("engine"),
            };
            let mut environment = settings.environment();
            let warm = format!("[\"{}/base:played\"]", registry_wire.address());
            for (name, value) in [
                ("PATH", path.as_str()),
                ("KILN_STREAMS__REPLICAS", "3"),
                ("KILN_HOLDERS__LEASE_SECONDS", LEASE_SECONDS),
                ("KILN_ORCHESTRATOR__SLOTS", "3"),
                ("KILN_CACHE_WARMER__REFS", &warm),
            ] {
                environment.push((name.to_owned(), value.to_owned()));
            }
            let name = format!("{role}-{number}");
            let stderr = folder.join(format!("{name}.log"));
            let process = Process::new(&program()?, role, &stderr, environment)?;
            let callers =
                if role == "gateway" { Some(Wire::to(&process.grpc().to_string()).await?) } else { None };
            roles.push(Role { name, process: Mutex::new(process), bus, callers });
        }
        let world = Self {
            sources: Sources::new(&workshop)?,
            workshop,
            registry_wire,
            nodes: cluster.nodes.into_iter().map(Mutex::new).collect(),
            nodes_url,
            roles,
            bus_faults: RwLock::default(),
            fallen: std::sync::Mutex::default(),
            folder: folder.to_owned(),
        };
        for role in &world.roles {
            role.process.lock().await.start()?;
        }
        // One that finds the young cluster not able to make its streams ends, and is started again.
        tokio::select! {
            settled = world.settle() => settled?,
            () = world.keep_up() => {}
        }
        Ok(world)
    }

    /// The local engine's folder.
    pub(super) fn engine(&self) -> PathBuf {
        self.folder.join("engine")
    }

    /// A folder for each run.
    pub(super) fn runs(&self) -> PathBuf {
        self.engine().join("runs")
    }

    /// What each role said on standard error.
    pub(super) fn said(&self) -> Result<Vec<(&str, String)>> {
        let mut said = Vec::new();
        for role in &self.roles {
            let text = std::fs::read(self.folder.join(format!("{}.log", role.name)))?;
            said.push((role.name.as_str(), String::from_utf8_lossy(&text).into_owned()));
        }
        Ok(said)
    }

    /// All NATS servers, past the wires.
    pub(super) fn nodes_url(&self) -> &str {
        &self.nodes_url
    }

    /// A connection to the bus, past the wires.
    pub(super) async fn bus(&self) -> Result<Bus> {
        let connect =
            Connect { url: self.nodes_url.clone(), user: None, password: None, name: "chaos".into() };
        Ok(connect.connect().await?)
    }

    /// A client of each gateway; it connects when it is used, and finds out soon that nobody is there.
    pub(super) fn clients(&self) -> Result<Vec<BuildsClient<Channel>>> {
        let wires = self.roles.iter().filter_map(|role| role.callers.as_ref());
        let client = |wire: &Wire| {
            let endpoint = Endpoint::from_shared(format!("http://{}", wire.address()))?
                .connect_timeout(Duration::from_secs(2))
                .http2_keep_alive_interval(Duration::from_secs(1))
                .keep_alive_timeout(Duration::from_secs(3))
                .keep_alive_while_idle(true);
            anyhow::Ok(BuildsClient::new(endpoint.connect_lazy()).max_decoding_message_size(16 << 20))
        };
        wires.map(client).collect()
    }

    /// Starts roles again that ended by themselves, as whoever runs them would: at its start a role needs the bus. Never
    /// returns.
    pub(super) async fn keep_up(&self) {
        // Of the process that was seen ready: a short fault between two looks puts another in its place.
        let mut ready: Vec<Option<Pid>> = vec![None; self.roles.len()];
        loop {
            for (role, ready) in self.roles.iter().zip(&mut ready) {
                // Who has it does something to it, and starts it again.
                let Ok(mut process) = role.process.try_lock() else { continue };
                let pid = process.pid().ok();
                match process.ended() {
                    Ok(None) if process.is_ready().await => *ready = pid,
                    Ok(None) => {}
                    Ok(Some(status)) => {
                        if pid.is_some() && *ready == pid {
                            let fallen = format!("{} ended by itself: {status}", role.name);
                            self.fallen.lock().expect("nobody panics with it").push(fallen);
                        }
                        drop(process.start());
                    }
                    Err(error) => eprintln!("{}: {error:#}", role.name),
                }
            }
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
    }

    /// Waits until every role says that it is ready.
    pub(super) async fn settle(&self) -> Result<()> {
        for role in &self.roles {
            let ready = async {
                while !role.process.lock().await.is_ready().await {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            };
            let ready = tokio::time::timeout(READY, ready).await;
            ensure!(ready.is_ok(), "the {} is not ready", role.name);
        }
        Ok(())
    }

    /// Puts what the NATS servers said beside what the roles said.
    pub(super) async fn keep_logs(&self) -> Result<()> {
        for node in &self.nodes {
            let node = node.lock().await;
            std::fs::copy(node.log(), self.folder.join(format!("{}.log", node.name())))?;
        }
        Ok(())
    }

    /// Ends every role as an operator would; what didn't end well.
    pub(super) async fn end(&self) -> Result<Vec<String>> {
        let ended = self.roles.iter().map(|role| async {
            match role.process.lock().await.terminate(END).await {
                Ok(status) if status.success() => None,
                Ok(status) => Some(format!("{} ended on SIGTERM with {status}", role.name)),
                Err(error) => Some(format!("{}: {error:#}", role.name)),
            }
        });
        Ok(futures::future::join_all(ended).await.into_iter().flatten().collect())
    }
}
