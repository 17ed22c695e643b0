//! Where the programs are that `kiln up` runs, and what of our environment they are given.

use std::ffi::OsString;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

/// What a child sees of our environment.
const PASSED_ON: [&str; 5] = ["PATH", "HOME", "TMPDIR", "TZ", "SSL_CERT_FILE"];

/// The executable files of one of these names: those on the PATH first, in its order, then those of `folders`.
pub(crate) fn candidates(names: &[&str], folders: &[PathBuf]) -> Vec<PathBuf> {
    let path = variable("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(folders.iter().cloned())
        .flat_map(|folder| names.iter().map(move |name| folder.join(name)))
        .filter(|file| is_executable(file))
        .collect()
}

/// Where `scripts/bootstrap` puts programs.
pub(crate) fn bootstrap_folder() -> Option<PathBuf> {
    let cache = variable("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(variable("HOME")?).join(".cache")))?;
    Some(cache.join("kiln/tools/bin"))
}

/// Where data is kept unless the user says otherwise.
pub(crate) fn default_data_dir() -> Option<PathBuf> {
    let data = variable("XDG_DATA_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(variable("HOME")?).join(".local/share")))?;
    Some(data.join("kiln"))
}

/// The environment of a child, with `own` variables added.
pub(crate) fn environment(own: &[(&str, &str)]) -> Vec<(OsString, OsString)> {
    PASSED_ON
        .iter()
        .filter_map(|name| Some((OsString::from(name), variable(name)?)))
        .chain(own.iter().map(|(name, value)| (OsString::from(name), OsString::from(value))))
        .collect()
}

fn variable(name: &str) -> Option<OsString> {
    #[expect(
        clippy::disallowed_methods,
        reason = "where the user's programs and folders are is no configuration"
    )]
    let value = std::env::var_os(name);
    value.filter(|value| !value.is_empty())
}

fn is_executable(file: &Path) -> bool {
    file.metadata().is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
}
