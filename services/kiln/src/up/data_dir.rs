//! The data directory of `kiln up`: one process at a time uses it, and only its owner can look into it.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rand::RngExt as _;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use secrecy::{ExposeSecret as _, SecretString};

/// Held by the `kiln up` that uses the directory.
pub(crate) const LOCK: &str = "lock";

/// Who only looks whether it is held (`kiln doctor`) holds it for an instant.
const LOCK_TRIES: u32 = 5;
const LOCK_PAUSE: Duration = Duration::from_millis(20);

/// An open data directory. The lock is held as long as this is kept, and ends with the process, however that ends.
#[derive(Debug)]
pub(crate) struct DataDir {
    path: PathBuf,
    _lock: File,
}

/// Why a data directory can't be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("another `kiln up`{} uses the data directory {}: stop that one, or give this one another --data-dir", owner(.process), path.display())]
    InUse { path: PathBuf, process: String },
    #[error("{} is neither empty nor a data directory of Kiln: give another --data-dir", path.display())]
    Foreign { path: PathBuf },
    #[error("{operation} {}: {source}", path.display())]
    Io { operation: &'static str, path: PathBuf, source: std::io::Error },
}

impl DataDir {
    /// Opens the directory, and makes it where there is none.
    pub(crate) fn open(path: &Path) -> Result<Self, Error> {
        let lock_path = path.join(LOCK);
        make_private(path)?;
        if !lock_path.exists() && !is_empty(path)? {
            return Err(Error::Foreign { path: path.to_owned() });
        }
        fs::set_permissions(path, fs::Permissions::from_mode(0o700)).map_err(io("close to others", path))?;
        let path = path.canonicalize().map_err(io("find", path))?;
        let mut lock = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&lock_path)
            .map_err(io("open", &lock_path))?;
        let mut tries = 1..LOCK_TRIES;
        while let Err(error) = flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            if error != Errno::WOULDBLOCK {
                return Err(io("lock", &lock_path)(error.into()));
            }
            if tries.next().is_none() {
                let mut process = String::new();
                // Who holds it is a help in the message, no more.
                let _unread = lock.read_to_string(&mut process);
                return Err(Error::InUse { path, process: process.trim().to_owned() });
            }
            std::thread::sleep(LOCK_PAUSE);
        }
        lock.set_len(0)
            .and_then(|()| writeln!(lock, "{}", std::process::id()))
            .map_err(io("write", &lock_path))?;
        Ok(Self { path, _lock: lock })
    }

    /// The directory itself, absolute.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// A folder in it, made where there is none.
    pub(crate) fn folder(&self, name: &str) -> Result<PathBuf, Error> {
        let path = self.path.join(name);
        make_private(&path)?;
        Ok(path)
    }

    /// The text of a file in it, if there is one.
    pub(crate) fn read(&self, name: &str) -> Result<Option<String>, Error> {
        let path = self.path.join(name);
        match fs::read_to_string(&path) {
            Ok(text) => Ok(Some(text)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(io("read", &path)(error)),
        }
    }

    /// Writes a file (0600) whole, or not at all.
    pub(crate) fn write(&self, name: &str, content: &str) -> Result<PathBuf, Error> {
        let path = self.path.join(name);
        let new = self.path.join(format!("{name}.new"));
        let write = || {
            let mut file =
                OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
            file.write_all(content.as_bytes())?;
            file.sync_all()?;
            fs::rename(&new, &path)
        };
        write().map_err(io("write", &path))?;
        Ok(path)
    }

    /// Removes a file, if there is one.
    pub(crate) fn remove(&self, name: &str) -> Result<(), Error> {
        let path = self.path.join(name);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(io("remove", &path)(error)),
            _ => Ok(()),
        }
    }

    /// A secret that is made at the first start and kept since.
    pub(crate) fn secret(
        &self,
        name: &str,
        make: impl FnOnce() -> SecretString,
    ) -> Result<SecretString, Error> {
        if let Some(kept) = self.read(name)? {
            return Ok(SecretString::from(kept.trim().to_owned()));
        }
        let made = make();
        self.write(name, made.expose_secret())?;
        Ok(made)
    }
}

/// 192 random bits, as hex digits.
pub(crate) fn random_secret() -> SecretString {
    let bytes: [u8; 24] = rand::rng().random();
    bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>().into()
}

fn make_private(path: &Path) -> Result<(), Error> {
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(io("make the folder", path))
}

fn is_empty(path: &Path) -> Result<bool, Error> {
    Ok(fs::read_dir(path).map_err(io("read", path))?.next().is_none())
}

fn io(operation: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io { operation, path, source }
}

fn owner(process: &str) -> String {
    if process.is_empty() { String::new() } else { format!(" (process {process})") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_found_again_and_private() {
        let parent = tempfile::tempdir().expect("a folder");
        let path = parent.path().join("data");
        let first = DataDir::open(&path).expect("opened");
        let made = first.secret("seal.key", || "made once".into()).expect("a secret");
        assert_eq!(made.expose_secret(), "made once");
        first.folder("logs").expect("a folder");
        assert!(matches!(DataDir::open(&path), Err(Error::InUse { .. })));
        drop(first);

        let second = DataDir::open(&path).expect("opened again");
        let kept = second.secret("seal.key", || "made anew".into()).expect("a secret");
        assert_eq!(kept.expose_secret(), "made once");
        for (name, mode) in [("", 0o700), ("logs", 0o700), ("seal.key", 0o600), ("lock", 0o600)] {
            let found = fs::metadata(path.join(name)).expect("there").permissions().mode() & 0o777;
            assert_eq!(found, mode, "{name}");
        }
    }

    #[test]
    fn a_folder_of_somebody_else_is_left_alone() {
        let folder = tempfile::tempdir().expect("a folder");
        fs::write(folder.path().join("thesis.txt"), "mine").expect("written");
        let before = fs::metadata(folder.path()).expect("there").permissions();
        let error = DataDir::open(folder.path()).expect_err("refused").to_string();
        assert!(error.contains("neither empty nor a data directory of Kiln"), "{error}");
        assert_eq!(fs::metadata(folder.path()).expect("there").permissions(), before);
    }
}
