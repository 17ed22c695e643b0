//! Why a build failed: one closed set, so that a caller can tell the user's mistake from ours.

use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::step::Step;

/// The reason of a failed build, as `kiln.v1.FailureReason` names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum FailureReason {
    /// A step failed, or the Dockerfile does not parse: the user's.
    Dockerfile,
    /// The repository, revision or path is not there: the user's.
    Context,
    /// A pull or push was refused.
    RegistryDenied,
    /// The build took longer than it was allowed to.
    Timeout,
    /// The builder vanished, and its retries with it: ours.
    EngineLost,
    /// The builder reported success, but the image is not there: ours.
    ImageMissing,
    /// Ours.
    Internal,
    /// Nobody had a slot for it in time: ours.
    QueueExpired,
    /// A process of the build was killed for its memory; the message names the limit.
    OutOfMemory,
    /// A registry could not be asked, or limits us.
    RegistryUnavailable,
    /// A reason of a newer release.
    #[serde(other)]
    Unknown,
}

impl FailureReason {
    /// The name as it stands in events and on the command line.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Dockerfile => "DOCKERFILE",
            Self::Context => "CONTEXT",
            Self::RegistryDenied => "REGISTRY_DENIED",
            Self::Timeout => "TIMEOUT",
            Self::EngineLost => "ENGINE_LOST",
            Self::ImageMissing => "IMAGE_MISSING",
            Self::Internal => "INTERNAL",
            Self::QueueExpired => "QUEUE_EXPIRED",
            Self::OutOfMemory => "OUT_OF_MEMORY",
            Self::RegistryUnavailable => "REGISTRY_UNAVAILABLE",
            Self::Unknown => "UNKNOWN",
        }
    }
}

impl FailureReason {
    /// It was found when the last builder was no more: what that wrote does not tell it.
    pub fn is_found_afterwards(self) -> bool {
        matches!(self, Self::EngineLost | Self::ImageMissing | Self::QueueExpired)
    }
}

impl std::fmt::Display for FailureReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A failed build's reason with its sentence for the user.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    pub reason: FailureReason,
    /// At most [`crate::limits::MESSAGE_BYTES`]; it holds no secret.
    pub message: String,
}

impl Failure {
    /// A failure with its message cut to [`crate::limits::MESSAGE_BYTES`].
    pub fn new(reason: FailureReason, message: impl Into<String>) -> Self {
        Self { reason, message: crate::limits::truncated(message.into(), crate::limits::MESSAGE_BYTES) }
    }

    /// The end of a build that took longer than `limit`, whoever saw to it. Of its steps the longest is named; where no
    /// step has told its time, the one that it was `at`.
    pub fn took_too_long(limit: Duration, steps: &[Step], at: Option<&Step>) -> Self {
        let what = match (steps.iter().max_by_key(|step| step.duration_ms), at) {
            (Some(longest), _) => {
                let took = exactly(Duration::from_millis(longest.duration_ms.unwrap_or_default()));
                format!("; what ran longest: {} ({took})", longest.label())
            }
            (None, Some(at)) => format!("; it was at {}", at.label()),
            (None, None) => String::new(),
        };
        Self::new(FailureReason::Timeout, format!("the build took longer than {}{what}", exactly(limit)))
    }

    /// What a builder tells that was asked to stop. Why it was asked the journal knows: a cancel, or a passed deadline.
    pub fn asked_to_stop() -> Self {
        Self::new(FailureReason::Internal, "the build was cancelled")
    }
}

/// A limit as it was set, and what is compared with it.
fn exactly(time: Duration) -> String {
    match time.as_secs() {
        0..60 => format!("{:.1} s", time.as_secs_f64()),
        seconds @ 60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        seconds => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
    }
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::*;

    #[test]
    fn who_took_too_long_is_told_the_limit_and_what_took_it() {
        let step = |number, of, name: &str, duration_ms| Step {
            number,
            of,
            name: name.into(),
            started_at: Timestamp::UNIX_EPOCH,
            duration_ms,
            cached: false,
        };
        let steps = [step(1, 3, "FROM scratch", Some(40)), step(2, 3, "RUN make", Some(61_000))];
        let at = step(3, 0, "RUN make install", None);
        for (limit, steps, at, says) in [
            (150, &steps[..], Some(&at), "2 min 30 s; what ran longest: step 2/3 `RUN make` (1 min 1 s)"),
            (5_400, &[], Some(&at), "1 h 30 min; it was at step 3 `RUN make install`"),
            (4, &[], None, "4.0 s"),
        ] {
            let failure = Failure::took_too_long(Duration::from_secs(limit), steps, at);
            assert_eq!(failure.reason, FailureReason::Timeout);
            assert_eq!(failure.message, format!("the build took longer than {says}"));
        }
    }
}
