//! Ending what lives of a run whose builder can't or won't end it.
//!
//! There are no stored pids, which may have become somebody else's: who holds the run's lock belongs to the run. A
//! builder hands the lock down without close-on-exec; an engine (this one or another) only ever has it with
//! close-on-exec, so that no engine is taken for a builder.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// `O_CLOEXEC` as it stands in fdinfo's `flags`.
const CLOSE_ON_EXEC: u32 = 0o2_000_000;

/// Kills every process that holds the lock; those whose parent hands it to a new child meanwhile are the next call's.
pub(crate) fn holders(lock: &Path) -> io::Result<()> {
    let lock = identity(lock)?;
    for (pid, process) in processes()? {
        if !holds(&process, lock) {
            continue;
        }
        let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty()) else { continue };
        // The pid may have changed hands before it was opened; from here on it can't.
        if holds(&process, lock) {
            let _ = pidfd_send_signal(&pidfd, Signal::KILL);
        }
    }
    Ok(())
}

/// The processes that hold the lock, each with its program's name: to be shown. Those of other users can't be seen.
pub(crate) fn names(lock: &Path) -> io::Result<Vec<(Pid, String)>> {
    let lock = identity(lock)?;
    let holding = processes()?.into_iter().filter(|(_, process)| holds(process, lock));
    Ok(holding
        .map(|(pid, process)| {
            let name = fs::read_to_string(process.join("comm")).unwrap_or_default();
            (pid, name.trim().to_owned())
        })
        .collect())
}

fn identity(file: &Path) -> io::Result<(u64, u64)> {
    fs::metadata(file).map(|file| (file.dev(), file.ino()))
}

fn processes() -> io::Result<Vec<(Pid, PathBuf)>> {
    let of_number = |name: &str| name.parse().ok().and_then(Pid::from_raw);
    let all = fs::read_dir("/proc")?.flatten();
    Ok(all.filter_map(|entry| Some((of_number(entry.file_name().to_str()?)?, entry.path()))).collect())
}

fn holds(process: &Path, lock: (u64, u64)) -> bool {
    let descriptors = fs::read_dir(process.join("fd")).into_iter().flatten().flatten();
    let mut of_lock = descriptors.filter(|descriptor| {
        fs::metadata(descriptor.path()).is_ok_and(|file| (file.dev(), file.ino()) == lock)
    });
    of_lock.any(|descriptor| {
        let info =
            fs::read_to_string(process.join("fdinfo").join(descriptor.file_name())).unwrap_or_default();
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
        let flags = flags.and_then(|flags| u32::from_str_radix(flags.trim(), 8).ok());
        flags.is_some_and(|flags| flags & CLOSE_ON_EXEC == 0)
    })
}
