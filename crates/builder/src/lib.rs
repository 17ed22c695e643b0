//! What runs inside a run: fetches the context, executes the Dockerfile, pushes, makes the target, leaves an outcome.
//!
//! - **I am asked** by a run's folder ([`kiln_domain::run_folder`]): a spec and secrets in it; `cancel` and `revoked`
//!   appear in it while I work.
//! - **I ask** the git remote, the build tool and registries.
//! - **I tell** by standard output (the build's log, unchanged), `target-digest` (before the target is PUT) and
//!   `outcome.json` (what became of the build).
//! - **I never** go on without the run's lock, PUT the target of a revoked or cancelled run, or leave a process of the run behind (what exports layers holds none of its locks, and PUTs no image).
//!
//! A run that was cancelled has an outcome of reason INTERNAL that says so. That is for the reader of the folder: whether
//! a build is *cancelled* is decided by the journal. A run that was revoked, or whose builder got SIGTERM (its host goes
//! down), has no outcome: that is no answer to whether the build succeeds, and the run counts as lost. But what comes while
//! the target is PUT is obeyed only after that: a PUT that succeeds is the outcome.

mod base_images;
mod buildah;
mod buildkit;
mod children;
mod choice;
mod context;
mod dockerfile;
mod export;
mod folder;
pub mod inspect;
mod job;
mod leftovers;
mod lock;
mod memory;
mod output;
mod programs;
mod put;
mod registry_error;
mod secret_files;
mod stages;
mod stop;
mod target;
mod tool;

use std::path::Path;
use std::pin::pin;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use kiln_domain::failure::{Failure, FailureReason};
use kiln_domain::run::{Outcome, RunResult, Work};
use tokio::time::{Instant, timeout};

pub use crate::base_images::BaseImages;
pub use crate::buildkit::keep as keep_buildkitd;
pub use crate::choice::{Tool, choose, missing};
pub use crate::export::export as export_layers;
pub use crate::tool::{BuildRequest, BuildTool, Built, ToolError};

use crate::buildah::Buildah;
use crate::buildkit::Lease;
use crate::children::Children;
use crate::export::Aside;
use crate::folder::{Folder, Task};
use crate::job::{Job, Progress};
use crate::lock::{LockError, RunLock};
use crate::output::Output;
use crate::put::Put;
use crate::stop::{Stop, Stops};

/// For what is cleared after a build.
const CLEARING: Duration = Duration::from_secs(60);

/// How a builder ended; the number is its exit status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// The image is at the target, the outcome says so.
    Pushed = 0,
    /// The outcome tells why not.
    Failed = 1,
    /// The run is over, or revoked: what an earlier builder left behind was removed, nothing else was done.
    Over = 3,
    /// Another builder has the run.
    Held = 4,
    /// There is no run to be worked on, or no way to tell what became of it.
    Broken = 5,
    /// Told to end by a signal, or revoked, before the work was done: there is no outcome.
    Lost = 6,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// Works on the run in `run` to its end. Not to be called from within an async runtime: it brings its own, and it makes
/// this process the leader of a session, the holder of the run's lock and the parent of all orphans of its children.
///
/// A run that is over already, or revoked, is only cleared of what an earlier builder may have left.
pub fn run(run: &Path) -> Exit {
    // Refused only to who leads a group of processes already, which serves as well.
    let _ = rustix::process::setsid();
    let output = Output::default();
    let run = match run.canonicalize() {
        Ok(run) => run,
        Err(error) => return broken(&output, &format!("no run in `{}`: {error}", run.display())),
    };
    let lease = lease(&Folder::new(&run));
    let lock = match RunLock::take(&run) {
        Ok(lock) => lock,
        Err(LockError::Held) => return Exit::Held,
        Err(LockError::Io(error)) => return broken(&output, &format!("cannot lock the run: {error}")),
    };
    let folder = Folder::new(&run);
    let begun = folder.spec().map(|spec| {
        let over = folder.is_revoked() || folder.has_outcome() || folder.has_recorded_target();
        if !over {
            output.say(&format!("building {} (attempt {})", spec.target_ref, spec.run.attempt()));
        }
        over
    });
    let over = match begun {
        Ok(over) => over,
        // Without a spec there is nothing to go on with; what is there can still be cleared.
        Err(_) if folder.is_revoked() => true,
        Err(error) => return broken(&output, &format!("no run to work on: {error}")),
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => return broken(&output, &format!("cannot begin: {error}")),
    };
    if over {
        runtime.block_on(clear_old(&folder, output))
    } else {
        let (exit, aside) = runtime.block_on(work(&folder, output.clone(), &lease));
        if let Some(Err(problem)) = aside.map(|aside| start_export(&aside, &lock, &lease)) {
            output.say(&format!("the build's layers are not exported: {problem}"));
        }
        exit
    }
}

/// What exports the layers goes on when this builder has ended, with the daemon, but not with the run.
fn start_export(
    aside: &Aside,
    lock: &RunLock,
    lease: &Result<Option<Arc<Lease>>, String>,
) -> std::io::Result<()> {
    lock.keep_from_children()?;
    let _handed = lease.iter().flatten().map(|lease| lease.hand_down()).collect::<Result<Vec<_>, _>>()?;
    aside.start()
}

/// Takes Kiln's own BuildKit daemon into use, where this run is one for it.
fn lease(folder: &Folder) -> Result<Option<Arc<Lease>>, String> {
    // What can't be read here is told of where it is needed.
    let (Ok(spec), Ok(settings)) = (folder.spec(), folder.settings()) else { return Ok(None) };
    let over = folder.is_revoked() || folder.has_outcome() || folder.has_recorded_target();
    let own = settings.buildkit.addresses.is_empty() && choose(&settings) == Ok(Tool::Buildkit);
    if over || !own || !matches!(spec.work, Work::Build { .. }) {
        return Ok(None);
    }
    Lease::take(&settings).map(|lease| Some(Arc::new(lease))).map_err(|error| error.to_string())
}

fn broken(output: &Output, problem: &str) -> Exit {
    output.say(problem);
    Exit::Broken
}

/// How it ended, and what is to be exported after that.
async fn work(
    folder: &Folder,
    output: Output,
    lease: &Result<Option<Arc<Lease>>, String>,
) -> (Exit, Option<Aside>) {
    let begun = Instant::now();
    let prepared = folder.task().map_err(|error| describe(&error)).and_then(|task| {
        let children = Children::new(output.clone()).map_err(|error| describe(&error))?;
        Ok((task, children, Stops::new().map_err(|error| describe(&error))?))
    });
    let (task, children, mut stops) = match prepared {
        Ok(prepared) => prepared,
        Err(problem) => {
            let failure =
                Failure::new(FailureReason::Internal, format!("the builder cannot begin: {problem}"));
            let outcome = Outcome { result: RunResult::Failed(failure), findings: Default::default() };
            return (leave(folder, &output, &outcome), None);
        }
    };
    let deadline = begun + task.spec.timeout();
    let put = Put::default();
    let job = Job { folder, task: &task, children: &children, deadline, lease, put: &put };
    let mut progress = Progress::default();
    let ended = {
        let mut running = pin!(job.run(&mut progress));
        tokio::select! {
            biased;
            result = &mut running => Ok(result),
            stop = stops.wait(folder, deadline, &output) => {
                if put.is_under_way() {
                    output.say("told to stop while the target is PUT: stopping after that");
                }
                tokio::select! {
                    biased;
                    result = running => result.map(Ok).map_err(|_| stop),
                    _none_begins = put.no_more() => Err(stop),
                }
            }
        }
    };
    let ended = match ended {
        // What the build tool works with is gone: that says nothing of the build.
        Ok(Err(failure)) if failure.reason == FailureReason::EngineLost => Err(Stop::Lost(failure.message)),
        Ok(Err(failure)) => stops.loss(folder).await.map_or(Ok(Err(failure)), Err),
        // Whatever came after it, the image is there.
        Err(stop) => progress.target.take().map(Ok).ok_or(stop),
        ended => ended,
    };
    children.end_all().await;
    let steps = output.steps();
    let result = match ended {
        Ok(Ok(digest)) => RunResult::Pushed(digest),
        Ok(Err(failure)) => RunResult::Failed(failure),
        Err(stop) if stop.is_loss() => {
            output.say(&format!("stopped: {}", stop.failure(task.spec.timeout(), &steps).message));
            clear(folder, &task, &children, &progress).await;
            return (Exit::Lost, None);
        }
        Err(stop) => RunResult::Failed(stop.failure(task.spec.timeout(), &steps)),
    };
    match &result {
        RunResult::Pushed(digest) => output.say(&format!("done: {}@{digest}", task.spec.target_ref.name())),
        RunResult::Failed(failure) => output.say(&format!("failed: {}", failure.message)),
    }
    progress.findings.steps = steps;
    let outcome = Outcome { result, findings: std::mem::take(&mut progress.findings) };
    let exit = leave(folder, &output, &outcome);
    let aside = if exit == Exit::Pushed { put_aside(folder, &output, &progress) } else { None };
    clear(folder, &task, &children, &progress).await;
    // On a full disk there may be room for it only now.
    (if exit == Exit::Broken { leave(folder, &output, &outcome) } else { exit }, aside)
}

fn leave(folder: &Folder, output: &Output, outcome: &Outcome) -> Exit {
    match (folder.write_outcome(outcome), &outcome.result) {
        (Ok(()), RunResult::Pushed(_)) => Exit::Pushed,
        (Ok(()), RunResult::Failed(_)) => Exit::Failed,
        (Err(error), _) => broken(output, &format!("cannot write the outcome: {error}")),
    }
}

fn put_aside(folder: &Folder, output: &Output, progress: &Progress) -> Option<Aside> {
    let export = progress.tool.as_ref()?.export()?;
    let aside = export.put_aside(&folder.work());
    aside.inspect_err(|error| output.say(&format!("the build's layers are not exported: {error}"))).ok()
}

async fn clear(folder: &Folder, task: &Task, children: &Children, progress: &Progress) {
    let clearing = async {
        match &progress.tool {
            Some(tool) => tool.clear(progress.built.as_ref()).await,
            None => Buildah::of(&task.settings, &folder.work(), children).clear(None).await,
        }
    };
    let cleared = timeout(CLEARING, clearing).await.unwrap_or(false);
    children.end_all().await;
    if let Err(error) = leftovers::remove(folder, cleared) {
        children.output().say(&format!("something is left in the run's folder: {error}"));
    }
}

/// After a builder that could not clear up itself.
async fn clear_old(folder: &Folder, output: Output) -> Exit {
    let Ok(children) = Children::new(output.clone()) else { return Exit::Broken };
    let mut cleared = true;
    if let Ok(settings) = folder.settings()
        && folder.work().exists()
    {
        let buildah = Buildah::of(&settings, &folder.work(), &children);
        cleared = timeout(CLEARING, buildah.clear_after_death()).await.unwrap_or(false);
        children.end_all().await;
    }
    match leftovers::remove(folder, cleared) {
        Ok(()) => Exit::Over,
        Err(error) => broken(&output, &format!("something is left in the run's folder: {error}")),
    }
}

fn describe(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
