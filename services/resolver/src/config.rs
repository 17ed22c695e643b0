//! What a resolver may be told.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Settings of the resolver, as they stand in the configuration file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// How long a tag's answer is given without asking its registry again; 0 asks each time.
    pub tag_fresh_seconds: u64,
    /// How old an answer may be that is given, marked stale, while the registry can't be asked; at most 24 h, which is
    /// what the replicas' shared cache keeps.
    pub serve_stale_seconds: u64,
    /// How long a registry may take when no answer is known.
    pub registry_timeout_seconds: u64,
    /// How long a registry may take when an older answer could be given instead.
    pub revalidate_timeout_seconds: u64,
    /// Questions that a registry is asked at once; further ones wait, within the same timeout.
    pub registry_at_once: usize,
    /// How long it is remembered that an image is not there; 0 asks each time. A build that makes it ends that at once.
    pub not_found_seconds: u64,
    /// Images whose answers are kept in memory.
    pub cached_images: u64,
    /// Registry hosts that are spoken to in plain HTTP; loopback is without being named.
    pub plain_http: Vec<String>,
    /// The git program: a path, or a name that is looked for in PATH.
    pub git: String,
    /// How long a git remote may take.
    pub git_timeout_seconds: u64,
    /// Git remotes that are asked at once; further ones wait, within the same timeout.
    pub git_at_once: usize,
    /// How long a git remote's answer is given again to who shows the same credentials; 0 asks each time.
    pub commit_fresh_seconds: u64,
    /// Admits `file://` git remotes.
    pub file_remotes: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            tag_fresh_seconds: 30,
            serve_stale_seconds: 24 * 60 * 60,
            registry_timeout_seconds: 20,
            revalidate_timeout_seconds: 3,
            registry_at_once: 32,
            not_found_seconds: 5,
            cached_images: 20_000,
            plain_http: Vec::new(),
            git: "git".into(),
            git_timeout_seconds: 20,
            git_at_once: 16,
            commit_fresh_seconds: 5,
            file_remotes: false,
        }
    }
}

impl Config {
    /// What is wrong with it, each by its key.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        for (key, seconds, range) in [
            ("tag_fresh_seconds", self.tag_fresh_seconds, 0..=60 * 60),
            ("serve_stale_seconds", self.serve_stale_seconds, 0..=24 * 60 * 60),
            ("registry_timeout_seconds", self.registry_timeout_seconds, 1..=300),
            ("revalidate_timeout_seconds", self.revalidate_timeout_seconds, 1..=300),
            ("not_found_seconds", self.not_found_seconds, 0..=60),
            ("git_timeout_seconds", self.git_timeout_seconds, 1..=300),
            ("commit_fresh_seconds", self.commit_fresh_seconds, 0..=60),
        ] {
            if !range.contains(&seconds) {
                problems.push(format!("{key}: must be between {} and {}", range.start(), range.end()));
            }
        }
        if self.git.is_empty() {
            problems.push("git: is missing".into());
        }
        for (key, at_once) in [("registry_at_once", self.registry_at_once), ("git_at_once", self.git_at_once)]
        {
            if !(1..=1_000).contains(&at_once) {
                problems.push(format!("{key}: must be between 1 and 1000"));
            }
        }
        problems
    }

    pub(crate) fn tag_fresh_for(&self) -> Duration {
        Duration::from_secs(self.tag_fresh_seconds)
    }

    pub(crate) fn serve_stale_for(&self) -> Duration {
        Duration::from_secs(self.serve_stale_seconds)
    }

    pub(crate) fn registry_timeout(&self) -> Duration {
        Duration::from_secs(self.registry_timeout_seconds)
    }

    pub(crate) fn revalidate_timeout(&self) -> Duration {
        Duration::from_secs(self.revalidate_timeout_seconds)
    }

    pub(crate) fn not_found_for(&self) -> Duration {
        Duration::from_secs(self.not_found_seconds)
    }

    pub(crate) fn git_timeout(&self) -> Duration {
        Duration::from_secs(self.git_timeout_seconds)
    }

    pub(crate) fn commit_fresh_for(&self) -> Duration {
        Duration::from_secs(self.commit_fresh_seconds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_right_and_problems_name_their_key() {
        assert_eq!(Config::default().problems(), Vec::<String>::new());
        let config = Config { git: String::new(), serve_stale_seconds: 100_000, ..Config::default() };
        let problems = config.problems();
        assert!(problems[0].starts_with("serve_stale_seconds: "), "{problems:?}");
        assert!(problems[1].starts_with("git: "), "{problems:?}");
    }
}
