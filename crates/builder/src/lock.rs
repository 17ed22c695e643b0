//! The locks of a run. See [`kiln_domain::run_folder`] for what each of them says.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use kiln_domain::run_folder;
use rustix::fs::{FlockOperation, flock, fstat};
use rustix::io::{FdFlags, fcntl_dupfd_cloexec, fcntl_setfd};

/// The lowest number that the inherited file descriptor may get.
const INHERITED: i32 = 200;

/// The run's lock, held until this process and every child of it is dead.
///
/// Its file descriptor is inherited by each child, so that git, the build tool and the steps hold it too.
pub(crate) struct RunLock {
    inherited: OwnedFd,
    /// Not inherited: it says whether the builder itself lives.
    _builder: File,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum LockError {
    #[error("another builder has this run")]
    Held,
    #[error("cannot lock the run")]
    Io(#[source] io::Error),
}

impl From<rustix::io::Errno> for LockError {
    fn from(errno: rustix::io::Errno) -> Self {
        if errno == rustix::io::Errno::WOULDBLOCK { Self::Held } else { Self::Io(errno.into()) }
    }
}

impl RunLock {
    /// Takes the lock: the engine's, where standard input is the locked file already (an flock belongs to the open file,
    /// so it has been held without a gap from before this process began), else the folder's own. Standard input is
    /// `/dev/null` afterwards, for this process and its children.
    pub(crate) fn take(run: &Path) -> Result<Self, LockError> {
        let path = run.join(run_folder::LOCK);
        let file = open(&path).map_err(LockError::Io)?;
        let stdin = std::io::stdin();
        let given = same_file(stdin.as_fd(), file.as_fd())?;
        let source = if given { stdin.as_fd() } else { file.as_fd() };
        flock(source, FlockOperation::NonBlockingLockExclusive)?;
        let inherited = inherited(source)?;
        let null = File::open("/dev/null").map_err(LockError::Io)?;
        rustix::stdio::dup2_stdin(&null)?;
        let builder = open(&run.join(run_folder::BUILDER_LOCK)).map_err(LockError::Io)?;
        // Free but for an observer's short look: whoever has the run's lock has this one.
        flock(&builder, FlockOperation::LockExclusive)?;
        Ok(Self { inherited, _builder: builder })
    }

    /// From now on no child is given the lock any more: for one that is to outlive the run.
    pub(crate) fn keep_from_children(&self) -> io::Result<()> {
        Ok(fcntl_setfd(&self.inherited, FdFlags::CLOEXEC)?)
    }
}

/// The lock of the moment in which the target is PUT. Children don't inherit it.
pub(crate) fn push_lock(run: &Path) -> io::Result<File> {
    let file = open(&run.join(run_folder::PUSH_LOCK))?;
    flock(&file, FlockOperation::LockExclusive)?;
    Ok(file)
}

/// The same open file, and with it its lock, passed on to each child while it is open.
pub(crate) fn inherited(file: impl AsFd) -> rustix::io::Result<OwnedFd> {
    // High, as a child may lay its own children's pipes over the lowest numbers (buildah does, and so dropped it).
    let inherited = fcntl_dupfd_cloexec(file, INHERITED)?;
    fcntl_setfd(&inherited, FdFlags::empty())?;
    Ok(inherited)
}

/// A file to be locked, made if it isn't there.
pub(crate) fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).truncate(false).read(true).write(true).open(path)
}

fn same_file(a: impl AsFd, b: impl AsFd) -> Result<bool, LockError> {
    let (a, b) = (fstat(a)?, fstat(b)?);
    Ok((a.st_dev, a.st_ino) == (b.st_dev, b.st_ino))
}
