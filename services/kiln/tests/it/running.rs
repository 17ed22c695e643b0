//! `kiln up` on free ports, and what can be seen of it from outside: lines, ports, children.

use std::io::{BufRead as _, BufReader, Read as _};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tokio::time::Instant;

/// How long anything that is waited for may take.
const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) const FREE_PORTS: [&str; 10] = [
    "--grpc-listen",
    "127.0.0.1:0",
    "--registry-listen",
    "127.0.0.1:0",
    "--nats-listen",
    "127.0.0.1:0",
    "--health-listen",
    "127.0.0.1:0",
    "--metrics-listen",
    "127.0.0.1:0",
];

/// A `kiln up`. Killed on drop, and its children with it.
pub(crate) struct Up {
    child: Child,
    data: PathBuf,
    lines: Arc<Mutex<String>>,
    pub(crate) ready_line: String,
}

/// The `kiln` of this build, without any variable of Kiln's.
pub(crate) fn kiln() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kiln"));
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("KILN_")) {
        command.env_remove(name);
    }
    command.env("KILN_LOG_FORMAT", "text").stdin(Stdio::null());
    command
}

/// Waits until `look` finds something.
pub(crate) fn eventually<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let until = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < until, "{what}: not within {} s", PATIENCE.as_secs());
        std::thread::sleep(Duration::from_millis(10));
    }
}

impl Up {
    /// Starts it and waits for its ready line.
    pub(crate) fn start(data: &Path) -> Self {
        Self::start_with(data, &[])
    }

    pub(crate) fn start_with(data: &Path, arguments: &[&str]) -> Self {
        let mut child = kiln()
            .arg("up")
            .arg("--data-dir")
            .arg(data)
            .args(FREE_PORTS)
            .args(arguments)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("started");
        let lines = Arc::new(Mutex::new(String::new()));
        let stderr = BufReader::new(child.stderr.take().expect("its stderr"));
        let kept = lines.clone();
        std::thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                kept.lock().expect("the lines").push_str(&format!("{line}\n"));
            }
        });
        let mut ready_line = String::new();
        BufReader::new(child.stdout.take().expect("its stdout")).read_line(&mut ready_line).expect("a line");
        let up = Self { child, data: data.to_owned(), lines, ready_line };
        assert!(up.ready_line.starts_with("kiln is ready: "), "{:?}\n{}", up.ready_line, up.log());
        up
    }

    /// What it said on stderr so far.
    pub(crate) fn log(&self) -> String {
        self.lines.lock().expect("the lines").clone()
    }

    pub(crate) fn endpoints(&self) -> Value {
        let text = std::fs::read_to_string(self.data.join("endpoints.json")).expect("endpoints.json");
        serde_json::from_str(&text).expect("JSON")
    }

    /// One endpoint's address.
    pub(crate) fn address(&self, name: &str) -> SocketAddr {
        let endpoints = self.endpoints();
        let text = endpoints[name].as_str().expect("an endpoint");
        text.rsplit_once('@').map_or(text, |(_, address)| address).parse().expect("an address")
    }

    /// The child whose program's name contains `program`.
    pub(crate) fn child_of_name(&self, program: &str) -> Option<u32> {
        children(self.child.id()).into_iter().find(|pid| command_line(*pid).contains(program))
    }

    /// Its children, once both run their own programs.
    pub(crate) fn both_children(&self) -> [u32; 2] {
        eventually("both children", || {
            Some([self.child_of_name("nats.conf")?, self.child_of_name("config.yml")?])
        })
    }

    pub(crate) fn kill(&mut self) {
        self.child.kill().expect("killed");
        self.child.wait().expect("waited for");
    }

    /// SIGTERM, and waits for the end.
    pub(crate) fn terminate(&mut self) -> ExitStatus {
        signal(self.child.id(), Signal::TERM);
        eventually("its end", || self.child.try_wait().expect("waited for"))
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        // Either fails only for one that has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(crate) fn signal(pid: u32, signal: Signal) {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).expect("a pid");
    kill_process(pid, signal).expect("signalled");
}

/// Gone, or dead and not waited for by whoever inherited it.
pub(crate) fn is_gone(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_none_or(|(_, rest)| rest.trim_start().starts_with('Z'))
}

/// Whether a connection is accepted.
pub(crate) fn answers(address: SocketAddr) -> bool {
    TcpStream::connect(address).is_ok()
}

/// The first line that NATS says, or none.
pub(crate) fn nats_greeting(address: SocketAddr) -> Option<String> {
    let mut line = String::new();
    BufReader::new(TcpStream::connect(address).ok()?).read_line(&mut line).ok()?;
    line.starts_with("INFO ").then_some(line)
}

/// The answer to a GET.
pub(crate) fn get(address: SocketAddr, path: &str) -> String {
    let mut stream = TcpStream::connect(address).expect("connected");
    let question = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    std::io::Write::write_all(&mut stream, question.as_bytes()).expect("asked");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("answered");
    answer
}

fn children(parent: u32) -> Vec<u32> {
    let Ok(threads) = std::fs::read_dir(format!("/proc/{parent}/task")) else { return Vec::new() };
    threads
        .filter_map(Result::ok)
        .filter_map(|thread| std::fs::read_to_string(thread.path().join("children")).ok())
        .flat_map(|pids| pids.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<u32>>())
        .collect()
}

fn command_line(pid: u32) -> String {
    let bytes = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes).replace('\0', " ");
    // Not yet the program, but on its way.
    if text.contains(" supervise ") { String::new() } else { text }
}
