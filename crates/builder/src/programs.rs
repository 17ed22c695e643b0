//! Where the programs are that a builder runs.

use std::ffi::OsString;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// Where Debian has runc, which not every user's PATH names.
const SYSTEM: [&str; 2] = ["/usr/sbin", "/sbin"];

/// The PATH, then `folder`, then the system's own.
pub(crate) fn folders(folder: Option<&Path>) -> Vec<PathBuf> {
    let path = std::env::vars_os().find(|(name, _)| name == "PATH").map(|(_, path)| path).unwrap_or_default();
    let folders = std::env::split_paths(&path).filter(|folder| folder.is_absolute());
    folders.chain(folder.map(Path::to_owned)).chain(SYSTEM.map(PathBuf::from)).collect()
}

/// [`folders`] as a PATH.
pub(crate) fn path(folder: Option<&Path>) -> OsString {
    std::env::join_paths(folders(folder)).unwrap_or_default()
}

/// The first executable file of this name.
pub(crate) fn find(name: &str, folder: Option<&Path>) -> Option<PathBuf> {
    let executable = |file: &PathBuf| {
        file.metadata().is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
    };
    folders(folder).into_iter().map(|folder| folder.join(name)).find(executable)
}
