//! What the local engine is told at its start.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use kiln_domain::run_folder::Settings;

/// What a builder may see of the environment: it is given no variable of Kiln's own, as those hold secrets.
const PASSED_ON: [&str; 15] = [
    "PATH",
    "HOME",
    "LANG",
    "LC_ALL",
    "TZ",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "ALL_PROXY",
    "http_proxy",
    "https_proxy",
    "no_proxy",
    "all_proxy",
];

/// How builders are run on this host.
#[derive(Clone, Debug)]
pub struct Config {
    /// The folder with a folder for each run. Absolute.
    pub runs: PathBuf,
    /// What is started as `program builder --run-dir DIR`: the `kiln` binary.
    pub program: PathBuf,
    /// What each builder is told of the installation.
    pub settings: Settings,
    /// What builders will execute Dockerfiles with, by these settings, as far as it is known.
    pub build_tool: Option<String>,
    /// The whole environment of a builder.
    pub environment: Vec<(OsString, OsString)>,
    /// How long a builder that was asked to end, or the children of one that died, may take before they are killed.
    pub grace: Duration,
}

impl Config {
    /// `storage`: where the build tool keeps layers. The environment is this process's, as far as it concerns a builder.
    pub fn new(runs: PathBuf, program: PathBuf, storage: PathBuf) -> Self {
        let passed = std::env::vars_os().filter(|(name, _)| PASSED_ON.iter().any(|passed| name == passed));
        Self {
            runs,
            program,
            settings: Settings::new(storage),
            build_tool: None,
            environment: passed.collect(),
            grace: Duration::from_secs(10),
        }
    }
}
