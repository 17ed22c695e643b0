//! What a cache-warmer may be told.

use std::time::Duration;

use kiln_domain::reference::ImageReference;
use serde::{Deserialize, Serialize};

/// Settings of the cache-warmer, as they stand in the configuration file.
///
/// The resolver gives a tag's answer for 30 s (its `tag_fresh_seconds`) without asking the registry. For a ref that is warm
/// nobody waits for a registry as long as `keep_younger_than_seconds` is below that: it is asked every 24 s, by
/// one HEAD as long as the tag isn't moved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// The images to keep warm, for linux/amd64.
    pub refs: Vec<String>,
    /// How often each is looked at, which costs no question to its registry.
    pub interval_seconds: u64,
    /// An answer that would be older than this before the next look is refreshed.
    pub keep_younger_than_seconds: u64,
    /// How long a resolver may take to answer.
    pub timeout_seconds: u64,
    /// Of the images that builds used, so many are kept warm beside the list: the most used ones; 0 keeps none. Each replica
    /// finds the same ones in the journal.
    pub used_images: usize,
    /// A build's use of an image weighs half as much after so long.
    pub used_half_life_seconds: u64,
    /// How often it is looked which images builds used.
    pub used_interval_seconds: u64,
    /// Answers of one registry that this process has refreshed in a minute, at most. A refresh is mostly one HEAD.
    pub refreshes_per_minute: u32,
    /// Of the images that are kept warm, so many bytes are also pulled into the store of this host's builds; 0 pulls none.
    pub pull_bytes: u64,
    /// After so long, layers that builds left in the registry are given up; a build that uses them writes them anew.
    pub layers_max_age_hours: u64,
    /// So many bytes of them may be there; the oldest go first.
    pub layers_max_bytes: u64,
    /// How often it is looked.
    pub layers_sweep_seconds: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            refs: Vec::new(),
            interval_seconds: 8,
            keep_younger_than_seconds: 28,
            timeout_seconds: 25,
            used_images: 20,
            used_half_life_seconds: 24 * 60 * 60,
            used_interval_seconds: 60,
            refreshes_per_minute: 120,
            pull_bytes: 0,
            layers_max_age_hours: 14 * 24,
            layers_max_bytes: 50_000_000_000,
            layers_sweep_seconds: 60 * 60,
        }
    }
}

impl Config {
    /// What is wrong with it, each by its key.
    pub fn problems(&self) -> Vec<String> {
        let mut problems: Vec<_> = self
            .refs
            .iter()
            .enumerate()
            .filter_map(|(at, text)| Some(format!("refs[{at}]: {}", text.parse::<ImageReference>().err()?)))
            .collect();
        if self.interval_seconds == 0 {
            problems.push("interval_seconds: must be at least 1".into());
        }
        if self.keep_younger_than_seconds <= self.interval_seconds {
            problems.push("keep_younger_than_seconds: must be above interval_seconds".into());
        }
        for (key, value) in [
            ("timeout_seconds", self.timeout_seconds),
            ("used_half_life_seconds", self.used_half_life_seconds),
            ("used_interval_seconds", self.used_interval_seconds),
            ("refreshes_per_minute", self.refreshes_per_minute.into()),
            ("layers_max_age_hours", self.layers_max_age_hours),
            ("layers_sweep_seconds", self.layers_sweep_seconds),
        ] {
            if value == 0 {
                problems.push(format!("{key}: must be at least 1"));
            }
        }
        problems
    }

    pub(crate) fn interval(&self) -> Duration {
        Duration::from_secs(self.interval_seconds)
    }

    pub(crate) fn keep_younger_than(&self) -> Duration {
        Duration::from_secs(self.keep_younger_than_seconds)
    }

    pub(crate) fn used_half_life(&self) -> Duration {
        Duration::from_secs(self.used_half_life_seconds)
    }

    pub(crate) fn used_interval(&self) -> Duration {
        Duration::from_secs(self.used_interval_seconds)
    }

    pub(crate) fn timeout(&self) -> Duration {
        Duration::from_secs(self.timeout_seconds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_problem_names_the_ref_by_its_place() {
        assert_eq!(Config::default().problems(), Vec::<String>::new());
        let refs = ["ubuntu:24.04", "UPPER/x"].map(str::to_owned).to_vec();
        let config = Config { refs, keep_younger_than_seconds: 8, ..Config::default() };
        let problems = config.problems();
        assert!(problems[0].starts_with("refs[1]: cannot parse image ref `UPPER/x`"), "{problems:?}");
        assert!(problems[1].starts_with("keep_younger_than_seconds: "), "{problems:?}");
    }
}
