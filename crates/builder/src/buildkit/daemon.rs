//! Kiln's own buildkitd, as a builder sees it: found by its socket, started where there is none.
//!
//! The daemon outlives builders and is no child of theirs: a [keeper](super::keeper) starts and ends it. Who uses it holds
//! a shared lock, and the keeper ends it only while it holds that lock alone. So a daemon that was found doesn't go away.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use kiln_domain::run_folder::Settings;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use tokio::time::{Instant, sleep};

use crate::folder::write_private;
use crate::lock::{inherited, open};

/// How long a daemon may take to answer. It reads its cache's index first.
const STARTING: Duration = Duration::from_secs(60);
/// How long a keeper may take to be there.
const KEEPER: Duration = Duration::from_secs(5);
const LOOK: Duration = Duration::from_millis(20);
/// sockaddr_un(7): the longest path of a socket.
const SOCKET_BYTES: usize = 107;

/// The daemon's folder: cache, socket, locks.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    folder: PathBuf,
}

impl Place {
    pub(crate) fn of(settings: &Settings) -> Self {
        Self { folder: settings.storage.join("buildkit") }
    }

    pub(crate) fn at(folder: &Path) -> Self {
        Self { folder: folder.to_owned() }
    }

    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.folder.join("buildkitd.sock")
    }

    pub(crate) fn address(&self) -> String {
        format!("unix://{}", self.socket().display())
    }

    /// What the keeper is told, as a [`Settings`].
    pub(crate) fn settings(&self) -> PathBuf {
        self.folder.join("settings.json")
    }

    pub(crate) fn log(&self) -> PathBuf {
        self.folder.join("buildkitd.log")
    }

    /// Held alone by the keeper, and by its daemon.
    pub(crate) fn keeper_lock(&self) -> io::Result<File> {
        open(&self.folder.join("keeper.lock"))
    }

    /// Whether a keeper lives, or what it started.
    pub(crate) fn is_kept(&self) -> io::Result<bool> {
        match flock(&self.keeper_lock()?, FlockOperation::NonBlockingLockShared) {
            Ok(()) => Ok(false),
            Err(Errno::WOULDBLOCK) => Ok(true),
            Err(error) => Err(error.into()),
        }
    }

    /// Held shared by who uses the daemon.
    pub(crate) fn users_lock(&self) -> io::Result<File> {
        open(&self.folder.join("users.lock"))
    }
}

/// The daemon is in use until this is dropped.
pub(crate) struct Lease {
    place: Place,
    users: File,
}

impl Lease {
    /// Takes the daemon into use; starts its keeper where none lives. To be called before this process holds what no
    /// daemon may inherit, and before orphans come to it: the keeper is to be nobody's child.
    pub(crate) fn take(settings: &Settings) -> io::Result<Self> {
        let place = Place::of(settings);
        if place.socket().as_os_str().len() > SOCKET_BYTES {
            let socket = place.socket();
            return Err(io::Error::other(format!(
                "the path of BuildKit's socket is longer than {SOCKET_BYTES} bytes: {}",
                socket.display()
            )));
        }
        std::fs::create_dir_all(place.folder())?;
        let users = place.users_lock()?;
        // It waits for a daemon that is just ending.
        flock(&users, FlockOperation::LockShared)?;
        if !place.is_kept()? {
            start_keeper(&place, settings)?;
        }
        Ok(Self { place, users })
    }

    /// A file that is passed on to children of this process while it is open: the daemon is in use for as long as one of them
    /// lives.
    pub(crate) fn hand_down(&self) -> io::Result<OwnedFd> {
        Ok(inherited(&self.users)?)
    }

    /// Waits until the daemon answers; its address.
    pub(crate) async fn ready(&self) -> Result<String, String> {
        let began = Instant::now();
        loop {
            if UnixStream::connect(self.place.socket()).is_ok() {
                return Ok(self.place.address());
            }
            // A keeper needs a moment to begin.
            let gone = began.elapsed() > KEEPER && self.place.is_kept().is_ok_and(|kept| !kept);
            if gone || began.elapsed() > STARTING {
                let log = std::fs::read_to_string(self.place.log()).unwrap_or_default();
                let last = log.lines().last().unwrap_or("it said nothing").to_owned();
                return Err(format!(
                    "BuildKit's daemon does not start (see {}): {last}",
                    self.place.log().display()
                ));
            }
            sleep(LOOK).await;
        }
    }
}

/// A process in between ends at once, so that the keeper's parent is whoever takes orphans in on this host.
fn start_keeper(place: &Place, settings: &Settings) -> io::Result<()> {
    let temporary = place.folder().join(format!("settings.json.{}", std::process::id()));
    write_private(&temporary, &serde_json::to_vec(settings)?)?;
    std::fs::rename(&temporary, place.settings())?;
    let status = keeper(place)
        .arg("--detach")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()?;
    if status.success() {
        Ok(())
    } else {
        Err(io::Error::other(format!("BuildKit's keeper does not start ({status})")))
    }
}

/// This program as a keeper.
pub(super) fn keeper(place: &Place) -> Command {
    // Still this program where its file was replaced meanwhile.
    let mut command = Command::new("/proc/self/exe");
    command.args(["keep-buildkitd", "--folder"]).arg(place.folder());
    command
}
