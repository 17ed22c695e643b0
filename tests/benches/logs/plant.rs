//! The processes that are measured, and builds of which this program plays the orchestrator and the builder.

use std::fs::File;
use std::io::Write as _;

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use kiln_bus::holders::{Holders, Member};
use kiln_bus::journal::{Entry, Journal};
use kiln_bus::logs::{LogWriter, Logs, Source};
use kiln_bus::seal::OpenKey;
use kiln_bus::secrets::{SecretsBucket, seal};
use kiln_bus::{Bus, Connect, Lease};
use kiln_contract::secrets::Secrets;
use kiln_domain::engine::{Cursor, Handle};
use kiln_domain::id::{BuildId, InstanceId};
use kiln_domain::run_folder;
use kiln_domain::transition::Change;
use kiln_proto::kiln_v1::build_logs_request::Start;
use kiln_proto::kiln_v1::builds_client::BuildsClient;
use kiln_proto::kiln_v1::{BuildLogsRequest, LogChunk};
use kiln_testkit::fleet::Fleet;
use kiln_testkit::installation::program;
use kiln_testkit::records::queued;
use kiln_testkit::registry::DockerRegistry;
use rustix::process::Pid;
use secrecy::{ExposeSecret as _, SecretString};
use tokio_util::task::TaskTracker;
use tonic::Streaming;
use tonic::transport::Channel;

pub(crate) struct Plant {
    pub(crate) fleet: Fleet,
    pub(crate) logs: Logs,
    bus: Bus,
    journal: Journal,
    seed: SecretString,
    by: InstanceId,
    /// As a log-relay: those logs that this program writes are left to it by the real one.
    holders: Holders,
    builds: u32,
    _registry: DockerRegistry,
}

/// A running build.
pub(crate) struct Build {
    pub(crate) id: BuildId,
    entry: Entry,
}

/// Its builder: what it writes is read by the log-relay. Dropped, it has ended.
pub(crate) struct Builder {
    output: File,
    _lock: File,
}

impl Plant {
    pub(crate) async fn start() -> Result<Self> {
        let registry = DockerRegistry::start().await?;
        let seed = OpenKey::new_seed()?;
        let roles = ["gateway", "log-relay"];
        let fleet = Fleet::start(&program()?, &registry, seed.expose_secret(), &roles).await?;
        let connect = Connect { url: fleet.nats.url(), user: None, password: None, name: "bench".into() };
        let bus = connect.connect().await?;
        let (logs, journal) = (Logs::new(&bus), Journal::open(&bus).await?);
        let by = InstanceId::new("orchestrator", 1)?;
        let tasks = TaskTracker::new();
        let holders = Holders::start(
            &bus,
            Member { role: "log-relay", life: "bench", ..Member::default() },
            Lease::default(),
            &tasks,
        )
        .await?;
        Ok(Self { holders, fleet, logs, bus, journal, seed, by, builds: 0, _registry: registry })
    }

    /// A build that runs, without a builder.
    pub(crate) async fn build(&mut self) -> Result<Build> {
        self.builds += 1;
        let mut entropy = [0; 10];
        entropy[..4].copy_from_slice(&self.builds.to_be_bytes());
        let record = queued(&format!("bench-{}", self.builds), entropy)?;
        let key = OpenKey::from_seed(self.seed.clone())?.seal_key();
        let secrets = Secrets { git_password: "correct horse battery".into(), ..Secrets::default() };
        SecretsBucket::open(&self.bus).await?.put(&record.id, seal(&key, &secrets)?).await?;
        let id = record.id.clone();
        let entry = self.journal.append(None, &Change::Queued(Box::new(record)), &self.by).await?;
        let claimed = Change::Claimed { by: self.by.clone() };
        let entry = self.journal.append(Some(&entry), &claimed, &self.by).await?;
        Ok(Build { id, entry })
    }

    /// Starts its builder.
    pub(crate) async fn builder(&self, build: &mut Build) -> Result<Builder> {
        let folder = self.fleet.runs().join(build.entry.record.run().as_str());
        std::fs::create_dir_all(&folder)?;
        let lock = File::create(folder.join(run_folder::LOCK))?;
        lock.lock()?;
        let output = File::create(folder.join(run_folder::OUTPUT))?;
        let started = Change::Started {
            by: self.by.clone(),
            handle: Handle::new("bench"),
            engine: "local".into(),
            build_tool: String::new(),
        };
        build.entry = self.journal.append(Some(&build.entry), &started, &self.by).await?;
        Ok(Builder { output, _lock: lock })
    }

    /// The build is over, and its builder has ended.
    pub(crate) async fn end(&self, build: &Build, builder: Builder) -> Result<()> {
        drop(builder);
        let digest = format!("sha256:{}", "a".repeat(64)).parse()?;
        let change = Change::Succeeded { by: self.by.clone(), digest, findings: Default::default() };
        self.journal.append(Some(&build.entry), &change, &self.by).await?;
        Ok(())
    }

    /// The log's writer in place of the relay, which has it at the moment.
    pub(crate) async fn writer(&self, build: &Build) -> Result<LogWriter> {
        let me = self.holders.me().context("no lease")?;
        loop {
            let tail = self.logs.tail(&build.id).await?;
            // Of two who claim it at once one wins.
            if let Ok(writer) = self.logs.claim(&build.id, &me, tail.as_ref()).await {
                return Ok(writer);
            }
        }
    }

    /// Clients of the gateway, each with a connection of its own.
    pub(crate) async fn clients(&self, count: usize) -> Result<Vec<BuildsClient<Channel>>> {
        let address = self.fleet.process("gateway", 0)?.grpc();
        let mut clients = Vec::new();
        for _ in 0..count {
            let channel = Channel::from_shared(format!("http://{address}"))?.connect().await?;
            clients.push(BuildsClient::new(channel));
        }
        Ok(clients)
    }
}

impl Builder {
    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<()> {
        Ok(self.output.write_all(bytes)?)
    }
}

pub(crate) async fn append(writer: &mut LogWriter, bytes: Bytes, complete: bool) -> Result<()> {
    let position = writer.end() + bytes.len() as u64;
    let source = Source { attempt: 1, cursor: Cursor::new(position.to_string()) };
    Ok(writer.append(bytes, source, complete).await?)
}

/// A followed log.
pub(crate) async fn follow(
    client: &mut BuildsClient<Channel>,
    id: &BuildId,
    start: Option<Start>,
) -> Result<Streaming<LogChunk>> {
    let request = BuildLogsRequest { id: id.to_string(), follow: true, start };
    Ok(client.build_logs(request).await?.into_inner())
}

/// Reads a log to its completion: how many messages and bytes.
pub(crate) async fn to_the_end(mut log: Streaming<LogChunk>) -> Result<(u64, u64)> {
    let (mut messages, mut bytes, mut complete) = (0, 0, false);
    while let Some(chunk) = log.message().await? {
        messages += 1;
        bytes += chunk.content.len() as u64;
        complete = chunk.complete;
    }
    ensure!(complete, "a log ended at {bytes} without being complete");
    Ok((messages, bytes))
}

/// A process's resident memory, in bytes.
pub(crate) fn resident(pid: Pid) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", pid.as_raw_nonzero()))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    let kib: u64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kib * 1024)
}

/// The processor time that a process has had, in seconds.
pub(crate) fn processor(pid: Pid) -> Result<f64> {
    /// Linux counts in hundredths, on every machine that Kiln runs on.
    const TICKS: f64 = 100.0;
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero()))?;
    // The name, which may hold anything, ends with the last parenthesis.
    let fields: Vec<&str> = stat.rsplit(')').next().context("no stat")?.split_whitespace().collect();
    let user: f64 = fields.get(11).context("no utime")?.parse()?;
    let system: f64 = fields.get(12).context("no stime")?.parse()?;
    Ok((user + system) / TICKS)
}
