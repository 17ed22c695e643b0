//! The local engine: `kiln builder` as a child in a session of its own, with a folder for each run.
//!
//! - **I am asked** by the orchestrator (start, observe, cancel, revoke, remove) and the log-relay (read).
//! - **I ask** the run's folder ([`kiln_domain::run_folder`]): its locks tell who lives, its files what became of it.
//! - **I tell** the builder through the same folder. It outlives me, and any process on this host with the same folder
//!   of runs adopts it: nothing of a run is kept in memory that isn't read again from there.
//! - **I never** store or signal a pid that I have not just seen hold the run's lock.

mod config;
mod folder;
mod host;
pub mod inspect;
mod kill;
mod read;

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io;
use std::process::Stdio;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use kiln_domain::engine::{Cursor, Engine, EngineError, Handle, Observed, Output};
use kiln_domain::id::RunId;
use kiln_domain::limits;
use kiln_domain::run::{Ended, RunSecrets, RunSpec};
use kiln_domain::run_folder;
use tokio::process::{Child, Command};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use crate::config::Config;
pub use crate::host::known as known_host;

use crate::folder::{Begun, Folder, Holder, forget_revoked};

/// How often an adopted run is looked at.
const LOOK: Duration = Duration::from_millis(100);
/// For the removal of what a builder left.
const CLEARING: Duration = Duration::from_secs(90);
/// How often that is tried in one call.
const CLEARINGS: u32 = 3;
/// How long a revocation outlives its run.
const REVOKED_FOR: Duration = Duration::from_secs(24 * 60 * 60);

/// Runs builders on this host.
pub struct LocalEngine {
    config: Config,
    tasks: TaskTracker,
    stop: CancellationToken,
    /// Builders that this process started, and whether they live.
    children: Arc<Mutex<HashMap<RunId, watch::Receiver<()>>>>,
    /// Runs that a task of this process sees to the end of.
    ending: Arc<Mutex<HashSet<RunId>>>,
}

impl LocalEngine {
    pub fn new(config: Config) -> Self {
        Self {
            config,
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
            children: Arc::default(),
            ending: Arc::default(),
        }
    }

    /// Forgets the revocations whose time is over; each removal of a run does so too.
    pub fn sweep(&self) {
        forget_revoked(&self.config.runs, inspect::now(), REVOKED_FOR);
    }

    /// Ends the engine's own tasks; builders run on.
    pub async fn close(&self) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }

    fn folder(&self, run: &RunId) -> Folder {
        Folder::new(self.config.runs.join(run.as_str()))
    }

    /// `program builder --run-dir DIR`; the locked file is its standard input, so the lock passes to it without a gap.
    fn builder(&self, folder: &Folder, lock: File) -> Command {
        let mut command = Command::new(&self.config.program);
        command
            .args(["builder", "--run-dir"])
            .arg(folder.path())
            .current_dir(folder.path())
            .env_clear()
            .envs(self.config.environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::from(lock));
        command
    }

    /// Waits for a child, so that it doesn't stay a zombie and whoever waits for the run wakes.
    fn reap(&self, run: RunId, mut child: Child) {
        let (lives, died) = watch::channel(());
        locked(&self.children).insert(run.clone(), died);
        let (children, stop) = (Arc::clone(&self.children), self.stop.clone());
        self.tasks.spawn(async move {
            tokio::select! {
                status = child.wait() => match status {
                    Ok(status) => tracing::debug!(run.id = %run, "builder ended: {status}"),
                    Err(error) => tracing::error!(run.id = %run, "cannot wait for the builder: {error}"),
                },
                () = stop.cancelled() => {}
            }
            locked(&children).remove(&run);
            drop(lives);
        });
    }

    /// After the grace, kills what lives of the run until nothing does. A PUT that had begun by then has the time that its
    /// request may take: of a builder killed in it nobody could say when the registry applies what it was sent.
    fn see_to_end(&self, run: &RunId) {
        if !locked(&self.ending).insert(run.clone()) {
            return;
        }
        let (run, folder, grace) = (run.clone(), self.folder(run), self.config.grace);
        let (ending, stop) = (Arc::clone(&self.ending), self.stop.clone());
        self.tasks.spawn(async move {
            let killing = async {
                sleep(grace).await;
                let put_over = Instant::now() + limits::REGISTRY_REQUEST;
                while blocking(&folder, Folder::is_ending).await != Ok(false) {
                    if Instant::now() < put_over && blocking(&folder, Folder::is_putting).await == Ok(true) {
                        sleep(LOOK).await;
                        continue;
                    }
                    tracing::warn!(run.id = %run, "killing what lives of the run {grace:?} after it was asked to end");
                    let _ = blocking(&folder, Folder::kill).await;
                    sleep(LOOK).await;
                }
            };
            tokio::select! {
                () = killing => {}
                () = stop.cancelled() => {}
            }
            locked(&ending).remove(&run);
        });
    }

    /// Runs the builder on a run that is over: it removes what an earlier one left.
    async fn clear(&self, folder: &Folder, lock: File) -> Result<(), EngineError> {
        let mut command = self.builder(folder, lock);
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().map_err(unavailable)?;
        drop(command);
        match timeout(CLEARING, child.wait()).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(unavailable(error)),
            Err(_) => {
                Err(EngineError::Unavailable(format!("clearing {} takes too long", folder.path().display())))
            }
        }
    }
}

#[async_trait]
impl Engine for LocalEngine {
    fn name(&self) -> &'static str {
        "local"
    }

    fn build_tool(&self) -> Option<String> {
        self.config.build_tool.clone()
    }

    /// Runs are processes, locks and files of it.
    fn host(&self) -> Result<Option<String>, EngineError> {
        let runs = &self.config.runs;
        host::named(runs)
            .map(Some)
            .map_err(|error| EngineError::Unavailable(format!("cannot name {}: {error}", runs.display())))
    }

    fn records_before_put(&self) -> bool {
        true
    }

    async fn start(&self, spec: &RunSpec, secrets: &RunSecrets) -> Result<Handle, EngineError> {
        let run = spec.run.clone();
        let folder = self.folder(&run);
        let (spec, secrets, settings) = (spec.clone(), secrets.clone(), self.config.settings.clone());
        let begun = blocking(&folder, move |folder| folder.begin(&spec, &secrets, &settings)).await?;
        match begun {
            Begun::Revoked => return Err(EngineError::Revoked),
            Begun::Before => {}
            Begun::Start { lock, output } => {
                let errors = output.try_clone().map_err(unavailable)?;
                let mut command = self.builder(&folder, lock);
                let spawned = command.stdout(output).stderr(errors).spawn();
                if let Err(error) = spawned.map(|child| self.reap(run.clone(), child)) {
                    // Still under the lock, which the command holds.
                    blocking(&folder, Folder::not_begun).await?;
                    let program = self.config.program.display();
                    return Err(EngineError::Unavailable(format!("cannot start `{program}`: {error}")));
                }
            }
        }
        Ok(Handle::new(run.as_str()))
    }

    async fn observe(&self, run: &RunId) -> Result<Observed, EngineError> {
        let handle = Handle::new(run.as_str());
        blocking(&self.folder(run), move |folder| {
            if folder.holder()? != Holder::Nobody {
                Ok(Observed::Running(handle))
            } else if folder.has(run_folder::OUTPUT)? {
                folder.ended().map(Observed::Ended)
            } else {
                Ok(Observed::Absent)
            }
        })
        .await
    }

    async fn ended(&self, run: &RunId, _handle: &Handle) -> Result<Ended, EngineError> {
        let folder = self.folder(run);
        let mut orphaned: Option<Instant> = None;
        loop {
            let child = locked(&self.children).get(run).cloned();
            match blocking(&folder, Folder::holder).await? {
                Holder::Nobody => return blocking(&folder, Folder::ended).await,
                Holder::Builder => orphaned = None,
                // The children of a dead builder make no image any more; they only keep the run from ending.
                Holder::Others if orphaned.get_or_insert_with(Instant::now).elapsed() > self.config.grace => {
                    tracing::warn!(run.id = %run, "killing what a dead builder left running");
                    blocking(&folder, Folder::kill).await?;
                }
                Holder::Others => {}
            }
            match child {
                Some(mut child) => drop(timeout(LOOK, child.changed()).await),
                None => sleep(LOOK).await,
            }
        }
    }

    async fn cancel(&self, run: &RunId) -> Result<(), EngineError> {
        let lives = blocking(&self.folder(run), |folder| {
            // A start has the lock from before its builder is there: what isn't held is over, or never was.
            let lives = folder.holder()? != Holder::Nobody;
            if lives {
                folder.ask_to_end()?;
            }
            Ok(lives)
        })
        .await?;
        if lives {
            self.see_to_end(run);
        }
        Ok(())
    }

    async fn revoke(&self, run: &RunId) -> Result<(), EngineError> {
        if blocking(&self.folder(run), Folder::revoke).await? {
            Ok(())
        } else {
            Err(EngineError::Unavailable("the builder is in the middle of its push".into()))
        }
    }

    async fn remove(&self, run: &RunId) -> Result<(), EngineError> {
        let folder = self.folder(run);
        if !blocking(&folder, Folder::exists).await? {
            return Ok(());
        }
        self.revoke(run).await?;
        let Some(lock) = blocking(&folder, Folder::take_lock).await? else {
            return Err(EngineError::Unavailable("the run's builder still lives".into()));
        };
        blocking(&folder, Folder::withdraw).await?;
        for attempt in 1.. {
            if !blocking(&folder, |folder| folder.has(run_folder::WORK)).await? {
                break;
            }
            // Who was about to kill a cancelled builder may hit the one that clears up after it.
            if attempt > CLEARINGS {
                return Err(EngineError::Unavailable("what the run's builder left cannot be removed".into()));
            }
            self.clear(&folder, lock.try_clone().map_err(unavailable)?).await?;
        }
        blocking(&folder, Folder::empty).await?;
        drop(lock);
        let runs = self.config.runs.clone();
        blocking(&folder, move |_| {
            forget_revoked(&runs, inspect::now(), REVOKED_FOR);
            Ok(())
        })
        .await
    }

    async fn read(&self, run: &RunId, from: &Cursor, max: usize) -> Result<Output, EngineError> {
        read::read(self.folder(run), from, max).await
    }

    fn advance(&self, from: &Cursor, bytes: &[u8]) -> Cursor {
        read::advance(from, bytes)
    }
}

/// Does what blocks for a moment where that holds up nobody.
pub(crate) async fn blocking<T: Send + 'static>(
    folder: &Folder,
    work: impl FnOnce(&Folder) -> io::Result<T> + Send + 'static,
) -> Result<T, EngineError> {
    let folder = folder.clone();
    let done = tokio::task::spawn_blocking(move || {
        work(&folder)
            .map_err(|error| EngineError::Unavailable(format!("{}: {error}", folder.path().display())))
    });
    done.await.map_err(unavailable)?
}

fn unavailable(error: impl std::fmt::Display) -> EngineError {
    EngineError::Unavailable(error.to_string())
}

/// What is in these is whole after each change: a poisoned lock is none.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
