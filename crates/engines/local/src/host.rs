//! Which processes reach the same builders: those of one boot of one machine that share a folder of runs. The boot alone would
//! take two containers of one machine for one host, though neither sees what the other runs.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::Path;

/// Beside the runs: no run is called so.
const NAME: &str = "host";

/// Names the place of `runs`; the first who asks gives the folder its name.
pub(crate) fn named(runs: &Path) -> io::Result<String> {
    DirBuilder::new().recursive(true).mode(0o700).create(runs)?;
    let name = runs.join(NAME);
    if !name.try_exists()? {
        // Whole or not at all, and one name only, whoever else does the same.
        let random = fs::read_to_string("/proc/sys/kernel/random/uuid")?;
        let draft = runs.join(format!("{NAME}.{}", random.trim()));
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&draft)?;
        file.write_all(random.trim().as_bytes())?;
        let linked = fs::hard_link(&draft, &name);
        fs::remove_file(&draft)?;
        match linked {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
    }
    known(runs)
}

/// The name of the place of `runs`; not found where no process has used it.
pub fn known(runs: &Path) -> io::Result<String> {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let folder = fs::read_to_string(runs.join(NAME))?;
    Ok(format!("{}/{}", boot.trim(), folder.trim()))
}

#[cfg(test)]
mod tests {
    use super::{known, named};

    #[test]
    fn who_shares_a_folder_is_on_one_host_and_who_has_another_is_not() {
        let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (one, other) = (one.path().join("runs"), other.path().join("runs"));
        assert_eq!(known(&one).unwrap_err().kind(), std::io::ErrorKind::NotFound);
        let names: Vec<String> = std::thread::scope(|threads| {
            let all: Vec<_> = (0..8).map(|_| threads.spawn(|| named(&one).unwrap())).collect();
            all.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert!(names.iter().all(|name| *name == known(&one).unwrap()), "{names:?}");
        assert_ne!(named(&other).unwrap(), named(&one).unwrap());
        assert_eq!(std::fs::read_dir(&one).unwrap().count(), 1, "only the name is left");
    }
}
