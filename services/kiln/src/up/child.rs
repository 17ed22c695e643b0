//! A program that runs as long as this process does: started again when it ends, never outliving us.
//!
//! The signal that ends it with us follows the *thread* that started it, so each has a thread of its own that starts
//! it, waits for it, and lives until it is stopped. The workers of the runtime may come and go.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process, waitid};
use tokio::sync::watch;
use tokio::time::Instant;

/// The pause before a program is started again: doubled each time, up to a bound, begun anew once it ran steadily.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
const STEADY: Duration = Duration::from_secs(30);
/// Between two looks at whether it answers.
const POLL: Duration = Duration::from_millis(10);
/// A log above this is begun anew at the next start; the one before is kept.
const LOG_BYTES: u64 = 16 << 20;
const QUOTED_BYTES: u64 = 4096;
const QUOTED_LINES: usize = 6;

/// What is to run.
#[derive(Clone, Debug)]
pub(crate) struct Program {
    /// As a user calls it, in messages.
    pub(crate) name: &'static str,
    pub(crate) path: PathBuf,
    pub(crate) arguments: Vec<OsString>,
    pub(crate) environment: Vec<(OsString, OsString)>,
    /// Where its output goes.
    pub(crate) log: PathBuf,
    /// The file whose lock it holds while it lives.
    pub(crate) lock: PathBuf,
}

/// A supervised program.
#[derive(Debug)]
pub(crate) struct Child {
    program: Program,
    shared: Arc<Shared>,
    ends: watch::Receiver<Ends>,
    thread: Option<JoinHandle<()>>,
}

/// Why a program is of no use.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StartError {
    #[error("{name} ended while it started ({how}); its log {} ends with:\n{tail}", log.display())]
    Ended { name: &'static str, how: String, log: PathBuf, tail: String },
    #[error("{name} does not answer after {} s ({why}); its log {} ends with:\n{tail}", within.as_secs(), log.display())]
    Silent { name: &'static str, within: Duration, why: String, log: PathBuf, tail: String },
    #[error("no thread for {name}: {source}")]
    NoThread { name: &'static str, source: std::io::Error },
}

/// How often it has ended, and how the last time.
#[derive(Clone, Debug, Default)]
struct Ends {
    count: u64,
    how: String,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Set while the process is there, so that a signal never meets another process of the same number.
    pid: Option<Pid>,
    stopping: bool,
}

impl Child {
    /// Starts the program, and goes on starting it until [`stop`](Self::stop).
    pub(crate) fn start(program: Program) -> Result<Self, StartError> {
        let shared = Arc::new(Shared::default());
        let (ended, ends) = watch::channel(Ends::default());
        let thread = std::thread::Builder::new()
            .name(program.name.to_owned())
            .spawn({
                let (program, shared) = (program.clone(), shared.clone());
                move || keep_running(&program, &shared, &ended)
            })
            .map_err(|source| StartError::NoThread { name: program.name, source })?;
        Ok(Self { program, shared, ends, thread: Some(thread) })
    }

    /// Waits until `probe` is content. A program that ends before that has failed: what is wrong with it now will be
    /// wrong at the next start.
    pub(crate) async fn ready<F>(&mut self, within: Duration, probe: F) -> Result<(), StartError>
    where
        F: AsyncFn() -> Result<(), String>,
    {
        let until = Instant::now() + within;
        loop {
            let why = match tokio::time::timeout_at(until, probe()).await {
                Ok(Ok(())) => return Ok(()),
                Ok(Err(why)) => why,
                Err(_elapsed) => "it accepts connections, but does not answer".to_owned(),
            };
            let Program { name, log, .. } = &self.program;
            let ends = self.ends.borrow().clone();
            if ends.count > 0 {
                return Err(StartError::Ended { name, how: ends.how, log: log.clone(), tail: tail(log) });
            }
            if Instant::now() >= until {
                return Err(StartError::Silent { name, within, why, log: log.clone(), tail: tail(log) });
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Ends the program: SIGTERM, and SIGKILL after the grace. Returns when it is gone.
    pub(crate) async fn stop(mut self, grace: Duration) {
        self.shared.stop(Signal::TERM);
        // The thread's end closes the channel.
        let mut ends = self.ends.clone();
        let ended = async { while ends.changed().await.is_ok() {} };
        if tokio::time::timeout(grace, ended).await.is_err() {
            tracing::warn!("{} does not end within {} s: killing it", self.program.name, grace.as_secs());
            self.shared.stop(Signal::KILL);
        }
        let Some(thread) = self.thread.take() else { return };
        if tokio::task::spawn_blocking(move || thread.join()).await.is_ok_and(|joined| joined.is_err()) {
            tracing::error!("the thread of {} panicked", self.program.name);
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stop(&self, signal: Signal) {
        let mut state = self.state();
        state.stopping = true;
        if let Some(pid) = state.pid {
            // It fails only for a process that has ended, which is what is asked for.
            let _ended = kill_process(pid, signal);
        }
        self.changed.notify_all();
    }

    /// Waits for the pause, or for the stop: then it returns true.
    fn stopped_within(&self, pause: Duration) -> bool {
        let (state, _) = self
            .changed
            .wait_timeout_while(self.state(), pause, |state| !state.stopping)
            .unwrap_or_else(PoisonError::into_inner);
        state.stopping
    }
}

fn keep_running(program: &Program, shared: &Shared, ended: &watch::Sender<Ends>) {
    let mut pause = FIRST_PAUSE;
    loop {
        let started = Instant::now();
        let how = match run_once(program, shared) {
            Ok(status) => status.to_string(),
            Err(error) => format!("it can't be started: {error}"),
        };
        ended.send_modify(|ends| *ends = Ends { count: ends.count + 1, how: how.clone() });
        if started.elapsed() >= STEADY {
            pause = FIRST_PAUSE;
        }
        if shared.state().stopping {
            return;
        }
        let name = program.name;
        tracing::warn!("{name} ended ({how}); it is started again in {} ms", pause.as_millis());
        if shared.stopped_within(pause) {
            return;
        }
        pause = LONGEST_PAUSE.min(pause * 2);
    }
}

fn run_once(program: &Program, shared: &Shared) -> std::io::Result<ExitStatus> {
    let log = open_log(&program.log)?;
    let mut child = Command::new(std::env::current_exe()?)
        .args(["supervise", "--parent", &std::process::id().to_string(), "--lock"])
        .arg(&program.lock)
        .arg("--")
        .arg(&program.path)
        .args(&program.arguments)
        // Our environment may hold secrets that are none of its business.
        .env_clear()
        .envs(program.environment.iter().map(|(name, value)| (name, value)))
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        // A Ctrl-C at the terminal is for us alone: the services still need it while they end.
        .process_group(0)
        .spawn()?;
    let pid = Pid::from_child(&child);
    {
        let mut state = shared.state();
        state.pid = Some(pid);
        if state.stopping {
            let _ended = kill_process(pid, Signal::TERM);
        }
    }
    // Awaited without being reaped, so that its number is nobody else's while it may still be signalled.
    while let Err(rustix::io::Errno::INTR) =
        waitid(WaitId::Pid(pid), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT)
    {}
    shared.state().pid = None;
    child.wait()
}

fn open_log(path: &Path) -> std::io::Result<File> {
    if std::fs::metadata(path).is_ok_and(|metadata| metadata.len() > LOG_BYTES) {
        std::fs::rename(path, path.with_extension("log.1"))?;
    }
    OpenOptions::new().append(true).create(true).mode(0o600).open(path)
}

/// The last lines of a log.
fn tail(log: &Path) -> String {
    let read = || -> std::io::Result<String> {
        let mut file = File::open(log)?;
        let start = file.metadata()?.len().saturating_sub(QUOTED_BYTES);
        file.seek(SeekFrom::Start(start))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    match read() {
        Ok(text) => {
            let lines: Vec<&str> = text.lines().collect();
            let last = lines.get(lines.len().saturating_sub(QUOTED_LINES)..).unwrap_or_default();
            if last.is_empty() { "  (nothing)".to_owned() } else { format!("  {}", last.join("\n  ")) }
        }
        Err(error) => format!("  (it can't be read: {error})"),
    }
}
