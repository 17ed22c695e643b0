//! A real nats-server of one's own for each test: a child process on a free port, its store in a folder that is
//! removed with it. One is up in some 10 ms, a cluster of three in a few seconds.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process, waitid};
use serde_json::Value;
use tempfile::TempDir;
use tokio::net::TcpStream;

use crate::fleet::free_ports;

/// How long a server may take to listen.
const START: Duration = Duration::from_secs(60);
/// How long a cluster may take to have a leader.
const ELECTION: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(2);

/// A running nats-server with JetStream. Killed on drop.
#[derive(Debug)]
pub struct NatsServer {
    folder: TempDir,
    program: PathBuf,
    name: String,
    /// 0 until the first start; then it stays the same over every restart.
    port: u16,
    routes: Option<Routes>,
    /// Bounds its store.
    store_bytes: Option<u64>,
    child: Option<Child>,
}

/// A server's place in a cluster.
#[derive(Debug, Clone)]
struct Routes {
    port: u16,
    all: Vec<u16>,
    /// Clients are not told of the other nodes.
    hidden: bool,
}

/// Some servers that are one JetStream cluster.
#[derive(Debug)]
pub struct NatsCluster {
    pub nodes: Vec<NatsServer>,
}

/// Starts one server.
pub async fn run_server() -> Result<NatsServer> {
    let mut server = NatsServer::new("alone".into(), None)?;
    server.start_again().await?;
    Ok(server)
}

/// Starts one that keeps no more than `bytes` on disk.
pub async fn run_small_server(bytes: u64) -> Result<NatsServer> {
    let mut server = NatsServer::new("alone".into(), None)?;
    server.store_bytes = Some(bytes);
    server.start_again().await?;
    Ok(server)
}

/// Starts a cluster of `size` and waits until it takes streams.
pub async fn run_cluster(size: usize) -> Result<NatsCluster> {
    cluster(size, false).await
}

/// Starts a cluster whose nodes don't tell clients of each other: who is given wires to them keeps to the wires.
pub async fn run_hidden_cluster(size: usize) -> Result<NatsCluster> {
    cluster(size, true).await
}

async fn cluster(size: usize, hidden: bool) -> Result<NatsCluster> {
    // The ports are chosen before the servers have them: another process may be quicker.
    for _ in 0..3 {
        match try_cluster(size, hidden).await {
            Ok(cluster) => return Ok(cluster),
            Err(error) => tracing::warn!("the cluster did not start, trying again: {error:#}"),
        }
    }
    try_cluster(size, hidden).await
}

async fn try_cluster(size: usize, hidden: bool) -> Result<NatsCluster> {
    // Not the kernel's choice: while a node is down, an outgoing connection might get its port.
    let mut ports = free_ports(2 * size)?;
    let all = ports.split_off(size);
    let mut nodes = Vec::new();
    for (number, (port, route)) in ports.iter().zip(&all).enumerate() {
        let routes = Routes { port: *route, all: all.clone(), hidden };
        let mut server = NatsServer::new(format!("node-{number}"), Some(routes))?;
        server.port = *port;
        server.launch()?;
        nodes.push(server);
    }
    for node in &mut nodes {
        node.listening().await?;
    }
    let cluster = NatsCluster { nodes };
    cluster.ready().await?;
    Ok(cluster)
}

/// As somebody's hand does it: the stream and all that it holds is gone. Of the servers at `url`, several with commas between.
pub async fn delete_stream(url: &str, stream: &str) -> Result<()> {
    by_hand(url).await?.delete_stream(stream).await?;
    Ok(())
}

async fn by_hand(url: &str) -> Result<async_nats::jetstream::Context> {
    let servers = url.split(',').map(str::parse).collect::<Result<Vec<async_nats::ServerAddr>, _>>()?;
    Ok(async_nats::jetstream::new(async_nats::connect(servers).await?))
}

/// The name of the node that leads a stream, asked of the servers at `url` (several with commas between).
pub async fn leader_of(url: &str, stream: &str) -> Result<String> {
    let info = by_hand(url).await?.get_stream(stream).await?.cached_info().clone();
    info.cluster.and_then(|cluster| cluster.leader).context("the stream has no leader now")
}

impl NatsServer {
    fn new(name: String, routes: Option<Routes>) -> Result<Self> {
        let folder = TempDir::new()?;
        std::fs::create_dir(folder.path().join("ports"))?;
        Ok(Self { folder, program: find_program()?, name, port: 0, routes, store_bytes: None, child: None })
    }

    /// `nats://127.0.0.1:port`, the same over every restart.
    pub fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.port)
    }

    /// `127.0.0.1:port`.
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// What it is called in its cluster.
    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn pid(&self) -> Result<Pid> {
        self.child.as_ref().map(Pid::from_child).context("the nats-server does not run")
    }

    /// Where its streams lie.
    pub fn store(&self) -> PathBuf {
        self.folder.path().join("store")
    }

    /// SIGKILL: nothing is flushed, the store stays.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            // Either fails only for a child that has ended already.
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// SIGTERM, and waits for the end. The store stays.
    pub fn stop(&mut self) -> Result<()> {
        self.signal(Signal::TERM)?;
        if let Some(mut child) = self.child.take() {
            child.wait()?;
        }
        Ok(())
    }

    /// SIGSTOP: it answers nothing once this returns, and its connections stay.
    pub fn pause(&self) -> Result<()> {
        self.signal(Signal::STOP)?;
        // The signal is sent, not yet obeyed: on a busy machine it would answer for a moment longer.
        waitid(WaitId::Pid(self.pid()?), WaitIdOptions::STOPPED | WaitIdOptions::NOWAIT)?;
        Ok(())
    }

    /// SIGCONT after [`NatsServer::pause`].
    pub fn resume(&self) -> Result<()> {
        self.signal(Signal::CONT)
    }

    /// Whether what is written to a stream is left unanswered, as by one that met a full disk.
    pub async fn take_in_silence(&self, stream: &str, silent: bool) -> Result<()> {
        let by_hand = by_hand(&self.url()).await?;
        let config = by_hand.get_stream(stream).await?.cached_info().config.clone();
        by_hand.update_stream(async_nats::jetstream::stream::Config { no_ack: silent, ..config }).await?;
        Ok(())
    }

    /// As somebody's hand does it: the stream and all that it holds is gone.
    pub async fn delete_stream(&self, stream: &str) -> Result<()> {
        delete_stream(&self.url(), stream).await
    }

    /// The same: all that the stream holds is gone.
    pub async fn purge_stream(&self, stream: &str) -> Result<()> {
        by_hand(&self.url()).await?.get_stream(stream).await?.purge().await?;
        Ok(())
    }

    /// Starts it on its port and its store, after [`NatsServer::kill`] or [`NatsServer::stop`], and waits until it
    /// listens.
    pub async fn start_again(&mut self) -> Result<()> {
        self.launch()?;
        self.listening().await
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        kill_process(self.pid()?, signal).context("signal the nats-server")
    }

    fn launch(&mut self) -> Result<()> {
        ensure!(self.child.is_none(), "the nats-server runs already");
        for old in std::fs::read_dir(self.folder.path().join("ports"))? {
            std::fs::remove_file(old?.path())?;
        }
        let config = self.folder.path().join("nats.conf");
        std::fs::write(&config, self.config())?;
        let output = std::fs::File::options().create(true).append(true).open(self.log())?;
        let child = Command::new(&self.program)
            .arg("-c")
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(output)
            .spawn()
            .with_context(|| format!("start {}", self.program.display()))?;
        self.child = Some(child);
        Ok(())
    }

    /// As the installation's own configuration: acknowledged is on disk, messages to 8 MiB.
    fn config(&self) -> String {
        let port = if self.port == 0 { "-1".to_owned() } else { self.port.to_string() };
        let (folder, name) = (self.folder.path().display(), &self.name);
        let bound = self.store_bytes.map_or_else(String::new, |bytes| format!(", max_file_store: {bytes}"));
        let mut config = format!(
            "server_name: {name}\nlisten: \"127.0.0.1:{port}\"\nports_file_dir: \"{folder}/ports\"\n\
             max_payload: 8388608\njetstream {{ store_dir: \"{folder}/store\", sync_interval: always{bound} }}\n"
        );
        if let Some(Routes { port, all, hidden }) = &self.routes {
            let others = all.iter().filter(|other| *other != port);
            let routes: Vec<_> = others.map(|other| format!("\"nats://127.0.0.1:{other}\"")).collect();
            config.push_str(&format!(
                "cluster {{ name: kiln, listen: \"127.0.0.1:{port}\", no_advertise: {hidden}, routes: [{}] }}\n",
                routes.join(", ")
            ));
        }
        config
    }

    /// The file that it logs to.
    pub fn log(&self) -> PathBuf {
        self.folder.path().join("log")
    }

    /// Waits until it listens: on its port, or, as long as that isn't known, by the file in which the server tells its ports.
    /// (It writes none when it needs more than five seconds until it is ready.)
    async fn listening(&mut self) -> Result<()> {
        let listening = async {
            loop {
                if let Some(status) = self.child.as_mut().and_then(|child| child.try_wait().transpose()) {
                    let log = std::fs::read_to_string(self.log()).unwrap_or_default();
                    bail!("the nats-server ended at its start ({}): {log}", status?);
                }
                if self.port != 0 && TcpStream::connect(("127.0.0.1", self.port)).await.is_ok() {
                    return Ok(self.port);
                }
                if let Some(port) = self.told_port()? {
                    return Ok(port);
                }
                tokio::time::sleep(POLL).await;
            }
        };
        self.port =
            tokio::time::timeout(START, listening).await.context("the nats-server does not listen")??;
        Ok(())
    }

    fn told_port(&self) -> Result<Option<u16>> {
        for file in std::fs::read_dir(self.folder.path().join("ports"))? {
            // It may be read before it is written whole.
            let Ok(ports) = serde_json::from_slice::<Value>(&std::fs::read(file?.path())?) else { continue };
            let url = ports.pointer("/nats/0").and_then(Value::as_str);
            if let Some(port) = url.and_then(|url| url.rsplit(':').next()) {
                return Ok(Some(port.parse()?));
            }
        }
        Ok(None)
    }
}

impl Drop for NatsServer {
    fn drop(&mut self) {
        self.kill();
    }
}

impl NatsCluster {
    /// A client's way in; it learns of the other nodes from the first.
    pub fn url(&self) -> String {
        self.nodes.first().map(NatsServer::url).unwrap_or_default()
    }

    /// Waits until the cluster answers for its streams: it has a leader for its own affairs, and knows all its members.
    /// Several times in a row: while the routes of a young cluster settle, a member counts as gone for moments.
    pub async fn ready(&self) -> Result<()> {
        let ready = async {
            let mut seen_whole = 0;
            while seen_whole < 4 {
                seen_whole = if self.size_seen().await? == self.nodes.len() { seen_whole + 1 } else { 0 };
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            anyhow::Ok(())
        };
        tokio::time::timeout(ELECTION, ready).await.context("the cluster has no leader")?
    }

    /// How many members a stream could have now: tried, as only that needs leader and peers.
    async fn size_seen(&self) -> Result<usize> {
        // Without a leader nobody answers at all.
        let js = async_nats::jetstream::context::ContextBuilder::new()
            .timeout(Duration::from_millis(500))
            .build(async_nats::connect(self.url()).await?);
        let probe = async_nats::jetstream::stream::Config {
            name: "TESTKIT_PROBE".into(),
            subjects: vec!["testkit.probe".into()],
            num_replicas: self.nodes.len(),
            ..Default::default()
        };
        let name = probe.name.clone();
        match js.get_or_create_stream(probe).await {
            Ok(stream) => {
                let size =
                    stream.cached_info().cluster.as_ref().map_or(0, |cluster| cluster.replicas.len() + 1);
                js.delete_stream(name).await?;
                Ok(size)
            }
            Err(_) => Ok(0),
        }
    }

    /// The node that leads a stream.
    pub async fn leader_of(&self, stream: &str) -> Result<usize> {
        let node = self.nodes.iter().find(|node| node.child.is_some()).context("no node runs")?;
        let leader = leader_of(&node.url(), stream).await?;
        self.nodes
            .iter()
            .position(|node| node.name == leader)
            .with_context(|| format!("`{leader}` is no node"))
    }
}

/// `KILN_NATS_SERVER`, then PATH, then where scripts/bootstrap puts one. A script is passed over: the signals of a
/// test would reach the shell that runs it, not the server.
fn find_program() -> Result<PathBuf> {
    if let Some(named) = variable("KILN_NATS_SERVER") {
        return Ok(named.into());
    }
    let cache = variable("XDG_CACHE_HOME").or_else(|| variable("HOME").map(|home| format!("{home}/.cache")));
    let own = cache.map(|cache| PathBuf::from(cache).join("kiln/tools/bin"));
    let path = variable("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(own)
        .map(|folder| folder.join("nats-server"))
        .find(|program| is_program(program))
        .context("no nats-server: run scripts/bootstrap, or name one in KILN_NATS_SERVER")
}

fn is_program(path: &Path) -> bool {
    let mut head = [0; 4];
    let read = std::fs::File::open(path).and_then(|mut file| std::io::Read::read_exact(&mut file, &mut head));
    read.is_ok() && head == *b"\x7fELF"
}

fn variable(name: &str) -> Option<String> {
    #[expect(clippy::disallowed_methods, reason = "where a tool lies is the environment's to say")]
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_server_keeps_its_port_and_its_streams_over_a_kill() -> Result<()> {
        let mut server = run_server().await?;
        let url = server.url();
        let js = async_nats::jetstream::new(async_nats::connect(&url).await?);
        js.create_stream(async_nats::jetstream::stream::Config { name: "S".into(), ..Default::default() })
            .await?;
        js.publish("S", "kept".into()).await?.await?;
        server.kill();
        server.start_again().await?;
        assert_eq!(server.url(), url);
        let js = async_nats::jetstream::new(async_nats::connect(&url).await?);
        assert_eq!(js.get_stream("S").await?.cached_info().state.messages, 1);
        server.pause()?;
        server.resume()?;
        server.stop()?;
        Ok(())
    }

    #[tokio::test]
    async fn three_are_a_cluster() -> Result<()> {
        let cluster = run_cluster(3).await?;
        let js = async_nats::jetstream::new(async_nats::connect(cluster.url()).await?);
        let config =
            async_nats::jetstream::stream::Config { name: "S".into(), num_replicas: 3, ..Default::default() };
        js.create_stream(config).await?;
        js.publish("S", "x".into()).await?.await?;
        cluster.leader_of("S").await?;
        Ok(())
    }
}
