//! `kiln supervise`: becomes another program that does not outlive the process that started it. Hidden: `kiln up`
//! starts its NATS and its registry through it.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use rustix::io::{Errno, FdFlags};
use rustix::process::{Signal, getppid, set_parent_process_death_signal};

/// A killed predecessor may need a moment to be gone.
const TRIES: u32 = 100;
const PAUSE: Duration = Duration::from_millis(50);

/// `kiln supervise --parent PID [--lock FILE] -- PROGRAM ARGUMENTS…`
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// The process that must be the parent, or nothing is started.
    #[arg(long)]
    parent: i32,
    /// A file whose lock the program holds as long as it lives, so that there is never a second one.
    #[arg(long)]
    lock: Option<PathBuf>,
    #[arg(last = true, required = true, num_args = 1..)]
    program: Vec<std::ffi::OsString>,
}

/// Returns only where the program could not be started.
pub(crate) fn run(options: &Options) -> ExitCode {
    let Err(error) = become_program(options);
    eprintln!("kiln supervise: {error}");
    ExitCode::FAILURE
}

fn become_program(options: &Options) -> Result<std::convert::Infallible, String> {
    // Kept by exec. It comes when the *thread* ends that started us.
    set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(|error| format!("can't be told when the parent ends: {error}"))?;
    // The parent may have ended before the line above.
    if getppid().map(|parent| parent.as_raw_nonzero().get()) != Some(options.parent) {
        return Err(format!("process {} is not the parent (any more)", options.parent));
    }
    let _lock = options.lock.as_ref().map(hold).transpose()?;
    let (program, arguments) = options.program.split_first().ok_or("no program is named")?;
    let error = Command::new(program).args(arguments).exec();
    Err(format!("can't start {}: {error}", program.display()))
}

/// Locks the file by a descriptor that exec does not close.
fn hold(path: &PathBuf) -> Result<File, String> {
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map_err(|error| format!("can't open {}: {error}", path.display()))?;
    for _ in 0..TRIES {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {
                return rustix::io::fcntl_setfd(&file, FdFlags::empty())
                    .map(|()| file)
                    .map_err(|error| format!("can't pass on the lock of {}: {error}", path.display()));
            }
            Err(Errno::WOULDBLOCK) => std::thread::sleep(PAUSE),
            Err(error) => return Err(format!("can't lock {}: {error}", path.display())),
        }
    }
    Err(format!("another process holds {}", path.display()))
}
