//! Where an installation's credentials come from.

use std::path::PathBuf;
use std::time::Duration;

use crate::helper::Helpers;
use serde::{Deserialize, Serialize};

/// The section `credentials` of the configuration file. By default there are none.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// A Docker config file; read anew when it changes.
    pub docker_config: Option<PathBuf>,
    /// Absolute folders in which the credential helpers that it names are looked for; empty: those of PATH.
    pub helper_folders: Vec<PathBuf>,
    /// How long a credential helper may take.
    pub helper_timeout_seconds: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self { docker_config: None, helper_folders: Vec::new(), helper_timeout_seconds: 10 }
    }
}

impl Config {
    /// What is wrong with it, each by its key.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if self.docker_config.as_ref().is_some_and(|path| !path.is_absolute()) {
            problems.push("docker_config: must be an absolute path".into());
        }
        if self.helper_folders.iter().any(|folder| !folder.is_absolute()) {
            problems.push("helper_folders: must be absolute paths".into());
        }
        if !(1..=60).contains(&self.helper_timeout_seconds) {
            problems.push("helper_timeout_seconds: must be between 1 and 60".into());
        }
        problems
    }

    pub(crate) fn helpers(&self) -> Helpers {
        let timeout = Duration::from_secs(self.helper_timeout_seconds);
        Helpers { folders: self.helper_folders.clone(), timeout }
    }
}
