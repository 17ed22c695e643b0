//! What a log-relay may be told.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Settings of the log-relay, as they stand in the configuration file.
///
/// Secrets of fewer than 6 bytes are not masked: that is no setting, as masking `a` would mask everything.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Bytes of one build's log. What a build writes beyond is not kept, and a line of the log says so.
    pub max_log_bytes: u64,
    /// A build is over, and its output neither ends nor goes on: after this long its log is completed as it is, and a
    /// line of it says so.
    pub output_patience_seconds: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self { max_log_bytes: 64 << 20, output_patience_seconds: 60 }
    }
}

impl Config {
    /// What is wrong with it, each by its key.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if self.max_log_bytes == 0 {
            problems.push("max_log_bytes: must be at least 1".into());
        }
        if self.output_patience_seconds == 0 {
            problems.push("output_patience_seconds: must be at least 1".into());
        }
        problems
    }

    pub(crate) fn output_patience(&self) -> Duration {
        Duration::from_secs(self.output_patience_seconds)
    }
}
