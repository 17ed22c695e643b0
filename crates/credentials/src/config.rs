//! Where an installation's credentials come from.

use std::path::PathBuf;
use std::time::Duration;

use crate::helper::Helpers;
use serde::{Deserialize, Serialize};
use url::Url;

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
    /// Amazon's registries, by whatever identity the process has on AWS.
    pub ecr: Option<Ecr>,
    /// Google's, by the service account of the machine or pod.
    pub google: Option<Google>,
    /// Azure's, by the managed identity of the machine or pod.
    pub azure: Option<Azure>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Ecr {
    /// The registries that a build may pull from whose request allows all; others are served when they are named.
    pub registries: Vec<String>,
    /// Where the API is, if not where AWS has it for each region.
    pub endpoint_url: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Google {
    /// As [`Ecr::registries`].
    pub registries: Vec<String>,
    pub metadata_url: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Azure {
    /// As [`Ecr::registries`].
    pub registries: Vec<String>,
    pub metadata_url: String,
    /// Which managed identity, where there are several.
    pub client_id: Option<String>,
}

impl Default for Google {
    fn default() -> Self {
        Self { registries: Vec::new(), metadata_url: "http://metadata.google.internal".into() }
    }
}

impl Default for Azure {
    fn default() -> Self {
        let metadata_url = "http://169.254.169.254".into();
        Self { registries: Vec::new(), metadata_url, client_id: None }
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            docker_config: None,
            helper_folders: Vec::new(),
            helper_timeout_seconds: 10,
            ecr: None,
            google: None,
            azure: None,
        }
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
        for (key, url) in [
            ("ecr.endpoint_url", self.ecr.as_ref().and_then(|ecr| ecr.endpoint_url.as_ref())),
            ("google.metadata_url", self.google.as_ref().map(|google| &google.metadata_url)),
            ("azure.metadata_url", self.azure.as_ref().map(|azure| &azure.metadata_url)),
        ] {
            let is_url =
                |url: &String| Url::parse(url).is_ok_and(|url| matches!(url.scheme(), "http" | "https"));
            if url.is_some_and(|url| !is_url(url)) {
                problems.push(format!("{key}: must be an http:// or https:// URL"));
            }
        }
        problems
    }

    pub(crate) fn helpers(&self) -> Helpers {
        let timeout = Duration::from_secs(self.helper_timeout_seconds);
        Helpers { folders: self.helper_folders.clone(), timeout }
    }
}
