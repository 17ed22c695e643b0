//! What an orchestrator may be told.

use serde::{Deserialize, Serialize};

/// Settings of the orchestrator, as they stand in the configuration file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Builds that this process runs at once.
    pub slots: usize,
    /// Builds that may wait; a further one is refused (RESOURCE_EXHAUSTED). The journal keeps room for the end of each: more need a
    /// larger `streams.journal_max_bytes`, of 9 MiB for each.
    pub max_queued: usize,
    /// Builds of one owner that run at once. It may be passed by one or two for a moment, when orchestrators race.
    pub max_running_per_owner: usize,
    /// Where base images are pushed: `registry/repository`, without a tag.
    pub base_image_repository: String,
    /// Where finished images are pushed: `registry/repository`, without a tag.
    pub workspace_image_repository: String,
    /// How long a build may run, unless its request says otherwise.
    pub default_timeout_seconds: u64,
    /// The longest timeout that a request may ask for; at most 24 h.
    pub max_timeout_seconds: u64,
    /// How long a build may wait; at most 24 h.
    pub queue_limit_seconds: u64,
    /// How long a registry may leave unsaid whether a build's image is there; then the build fails.
    pub registry_limit_seconds: u64,
    /// Registry hosts that are spoken to in plain HTTP; loopback is without being named.
    pub plain_http: Vec<String>,
    /// Admits `file://` git remotes.
    pub file_remotes: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            slots: 4,
            max_queued: 400,
            max_running_per_owner: 100,
            base_image_repository: String::new(),
            workspace_image_repository: String::new(),
            default_timeout_seconds: 60 * 60,
            max_timeout_seconds: 24 * 60 * 60,
            queue_limit_seconds: 8 * 60 * 60,
            registry_limit_seconds: 15 * 60,
            plain_http: Vec::new(),
            file_remotes: false,
        }
    }
}

impl Config {
    /// What is wrong with it, each by its key.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        for (key, repository) in [
            ("base_image_repository", &self.base_image_repository),
            ("workspace_image_repository", &self.workspace_image_repository),
        ] {
            let parsed = format!("{repository}:tag").parse::<kiln_domain::reference::ImageReference>();
            match parsed {
                _ if repository.is_empty() => problems.push(format!("{key}: is missing")),
                Ok(parsed) if parsed.name() == *repository && parsed.digest().is_none() => {}
                Ok(_) => {
                    problems.push(format!("{key}: `{repository}` must be registry/repository, without a tag"))
                }
                Err(error) => problems.push(format!("{key}: {error}")),
            }
        }
        let longest = kiln_domain::limits::LONGEST.as_secs();
        for (key, seconds) in [
            ("default_timeout_seconds", self.default_timeout_seconds),
            ("max_timeout_seconds", self.max_timeout_seconds),
            ("queue_limit_seconds", self.queue_limit_seconds),
            ("registry_limit_seconds", self.registry_limit_seconds),
        ] {
            if !(1..=longest).contains(&seconds) {
                problems.push(format!("{key}: must be between 1 and {longest}"));
            }
        }
        if self.default_timeout_seconds > self.max_timeout_seconds {
            problems.push("default_timeout_seconds: must not be above max_timeout_seconds".into());
        }
        for (key, number) in [
            ("slots", self.slots),
            ("max_queued", self.max_queued),
            ("max_running_per_owner", self.max_running_per_owner),
        ] {
            if number == 0 {
                problems.push(format!("{key}: must be at least 1"));
            }
        }
        problems
    }
}
