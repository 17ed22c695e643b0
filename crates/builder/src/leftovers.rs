//! What a run leaves on its host but its answer: secrets, mounts, the work folder.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use rustix::mount::{UnmountFlags, unmount};

use crate::folder::{Folder, removed};

/// Removes secrets and work folder. Nothing of the run works any more.
///
/// With `cleared` false, as something of the run is left in the build tool's storage, the work folder stays, empty: it is
/// what tells an engine to have it cleared once more.
pub(crate) fn remove(folder: &Folder, cleared: bool) -> io::Result<()> {
    let secrets = folder.remove_secrets();
    let work = folder.work();
    let worked = work.try_exists()?;
    remove_folder(&work)?;
    if worked && !cleared {
        std::fs::create_dir(&work)?;
        return Err(io::Error::other("the build tool could not remove its containers"));
    }
    secrets
}

/// Removes a folder with all that is mounted in it.
pub(crate) fn remove_folder(folder: &Path) -> io::Result<()> {
    for mount in mounts_under(folder)?.iter().rev() {
        unmount(mount, UnmountFlags::DETACH)?;
    }
    // Through a mount that stayed, something else's files would be removed: the look is repeated.
    if !mounts_under(folder)?.is_empty() {
        return Err(io::Error::other(format!("something is still mounted in {}", folder.display())));
    }
    removed(std::fs::remove_dir_all(folder))
}

/// In the order in which they were mounted.
pub(crate) fn mounts_under(folder: &Path) -> io::Result<Vec<PathBuf>> {
    // proc(5): the fifth field is the mount point, with \040 for a space and so on.
    let text = std::fs::read("/proc/self/mountinfo")?;
    let points = text.split(|b| *b == b'\n').filter_map(|line| line.split(|b| *b == b' ').nth(4));
    let points = points.map(|point| PathBuf::from(OsString::from_vec(unescaped(point))));
    Ok(points.filter(|point| point.starts_with(folder)).collect())
}

fn unescaped(text: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((first, after)) = rest.split_first() {
        let code =
            after.get(..3).filter(|_| *first == b'\\').and_then(|digits| std::str::from_utf8(digits).ok());
        match code.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                plain.push(byte);
                rest = after.get(3..).unwrap_or_default();
            }
            None => {
                plain.push(*first);
                rest = after;
            }
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_are_unescaped() {
        assert_eq!(unescaped(br"/a\040b\134c\"), br"/a b\c\");
    }
}
