//! Why a build failed: one closed set, so that a caller can tell the user's mistake from ours.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

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

    /// What a builder tells that was asked to stop. Why it was asked the journal knows: a cancel, or a passed deadline.
    pub fn asked_to_stop() -> Self {
        Self::new(FailureReason::Internal, "the build was cancelled")
    }
}
