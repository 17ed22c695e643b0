//! The builder's children: started with an environment that says nothing it need not, their output passed on, and all of
//! them ended with the builder, whatever they became.
//!
//! The builder is a *subreaper*: a process whose parent died becomes its child, so nothing that a step started can get
//! away by forking twice.

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, WaitOptions, kill_process, set_child_subreaper, waitpid};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::process::Command;
use tokio::time::{sleep, timeout};
use tokio_util::task::TaskTracker;

use crate::buildkit::Plain;
use crate::output::Output;

/// What a child may see of the builder's environment: where programs, time zones and certificates are, and proxies.
const PASSED_ON: [&str; 14] = [
    "PATH",
    "LANG",
    "LC_ALL",
    "TZ",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "ALL_PROXY",
    "http_proxy",
    "https_proxy",
    "no_proxy",
    "all_proxy",
];
/// The end of a child's output that is kept to tell what went wrong.
const TAIL_BYTES: usize = 16 * 1024;
/// For what SIGKILL doesn't end at once (a process that waits for a disk).
const ENDING: Duration = Duration::from_secs(20);

/// Starts children and ends them.
#[derive(Clone)]
pub(crate) struct Children {
    output: Output,
    pumps: TaskTracker,
}

/// Where a child's output goes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Show {
    /// Only the tail is kept.
    Nothing,
    Output,
    /// To the output, and its steps are noted.
    Steps,
    /// As [`Show::Steps`], of BuildKit's progress events as plain text; what is no event is kept as the tail.
    Events,
}

/// A child that has ended.
pub(crate) struct Finished {
    pub(crate) status: ExitStatus,
    /// The end of what it wrote.
    pub(crate) tail: String,
}

/// The home of the children that work in `work`.
pub(crate) fn home(work: &Path) -> PathBuf {
    work.join("home")
}

impl Children {
    /// Makes this process the one that orphans come to.
    pub(crate) fn new(output: Output) -> io::Result<Self> {
        set_child_subreaper(Some(rustix::process::getpid()))?;
        Ok(Self { output, pumps: TaskTracker::new() })
    }

    pub(crate) fn output(&self) -> &Output {
        &self.output
    }

    /// A command in the work folder `work`, which holds its home and temporary files.
    pub(crate) fn command(program: &Path, work: &Path) -> Command {
        let mut command = Command::new(program);
        let passed = std::env::vars_os().filter(|(name, _)| PASSED_ON.iter().any(|passed| name == passed));
        command.env_clear().envs(passed.collect::<Vec<(OsString, OsString)>>());
        command.env("HOME", home(work)).env("TMPDIR", work.join("tmp"));
        command.current_dir(work);
        command
    }

    /// Runs a command to its end, and ends what it left running. Where this future is dropped, the command goes on until
    /// [`Children::end_all`].
    pub(crate) async fn run(&self, mut command: Command, show: Show) -> io::Result<Finished> {
        let (reader, writer) = io::pipe()?;
        command.stdin(Stdio::null()).stdout(writer.try_clone()?).stderr(writer);
        let mut child = command.spawn()?;
        // The command holds the pipe's writing end.
        drop(command);
        let reader = pipe::Receiver::from_owned_fd(reader.into())?;
        let pump = self.pumps.spawn(pass_on(reader, self.output.clone(), show));
        let status = child.wait().await?;
        end_descendants().await;
        let tail = pump.await.map_err(io::Error::other)?;
        Ok(Finished { status, tail })
    }

    /// Ends every child and passes on the rest of their output.
    pub(crate) async fn end_all(&self) {
        end_descendants().await;
        self.pumps.close();
        let _ = timeout(ENDING, self.pumps.wait()).await;
        self.pumps.reopen();
    }
}

/// Ends every descendant of this process, to which orphans come.
pub(crate) async fn end_descendants() {
    let end_them = async {
        // Who is killed leaves its own children to this process: so again, until there are none.
        while let Some(children) = children_of_this_process().filter(|children| !children.is_empty()) {
            for pid in children {
                // A child that wasn't waited for keeps its pid: this can't hit a stranger.
                let _ = kill_process(pid, Signal::KILL);
                let _ = waitpid(Some(pid), WaitOptions::NOHANG);
            }
            sleep(Duration::from_millis(2)).await;
        }
    };
    let _ = timeout(ENDING, end_them).await;
}

/// Takes notice of orphans that have ended; `own` is waited for elsewhere.
pub(crate) fn reap_orphans(own: Option<Pid>) {
    for pid in children_of_this_process().unwrap_or_default() {
        if Some(pid) != own {
            let _ = waitpid(Some(pid), WaitOptions::NOHANG);
        }
    }
}

async fn pass_on(mut reader: pipe::Receiver, output: Output, show: Show) -> String {
    let mut buffer = vec![0; 64 * 1024];
    if show == Show::Events {
        let mut plain = Plain::default();
        let write = |text: &[u8]| {
            output.write(text);
            output.note_steps(text);
        };
        while let Ok(length @ 1..) = reader.read(&mut buffer).await {
            write(&plain.push(buffer.get(..length).unwrap_or_default()));
        }
        write(&plain.finish());
        return plain.words().to_owned();
    }
    let mut tail = Vec::new();
    while let Ok(length @ 1..) = reader.read(&mut buffer).await {
        let piece = buffer.get(..length).unwrap_or_default();
        if show != Show::Nothing {
            output.write(piece);
        }
        if show == Show::Steps {
            output.note_steps(piece);
        }
        tail.extend_from_slice(piece);
        if tail.len() > 2 * TAIL_BYTES {
            tail.drain(..tail.len() - TAIL_BYTES);
        }
    }
    String::from_utf8_lossy(&tail).into_owned()
}

/// None where the kernel doesn't say.
fn children_of_this_process() -> Option<Vec<Pid>> {
    let mut pids = Vec::new();
    for task in std::fs::read_dir("/proc/self/task").ok()? {
        let children = std::fs::read_to_string(task.ok()?.path().join("children")).unwrap_or_default();
        pids.extend(children.split_whitespace().filter_map(|pid| Pid::from_raw(pid.parse().ok()?)));
    }
    Some(pids)
}
