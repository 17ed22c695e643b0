//! A run: one attempt of one build by a builder. What the builder is given, and what it answers.

use std::collections::BTreeMap;
use std::time::Duration;

use schemars::JsonSchema;
use secrecy::SecretString;
use serde::{Deserialize, Serialize};

use crate::failure::Failure;
use crate::id::RunId;
use crate::platform::Platform;
use crate::reference::{Digest, ImageReference};
use crate::source::DockerfileSource;
use crate::step::Step;

/// What a builder is to do. It holds no secret: those come as [`RunSecrets`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunSpec {
    pub run: RunId,
    pub work: Work,
    pub target_ref: ImageReference,
    /// Who asked for the build first.
    #[serde(default)]
    pub owner: String,
    /// The builder gives up by itself after this long.
    pub timeout_ms: u64,
    pub no_cache: bool,
    /// Registry hosts (`host[:port]`) that are spoken to in plain HTTP; loopback is, without being named.
    pub plain_http: Vec<String>,
    /// `file://` git remotes are admitted.
    pub file_remotes: bool,
    /// W3C trace context of the build.
    pub traceparent: String,
}

impl RunSpec {
    pub fn timeout(&self) -> Duration {
        Duration::from_millis(self.timeout_ms)
    }
}

/// The two ways to make an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Work {
    /// The target becomes a copy of an image that exists.
    /// Without a platform: of all that it is, an index with each of its images.
    Copy {
        from: ImageReference,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        platform: Option<Platform>,
    },
    /// The Dockerfile is executed, the result pushed to the base ref, and the target becomes a copy of that.
    Build { source: DockerfileSource, commit: String, base_ref: ImageReference },
}

/// The secrets of one run: files of the run's folder or pod, never arguments.
#[derive(Clone, Debug, Default)]
pub struct RunSecrets {
    pub git_username: String,
    pub git_password: Option<SecretString>,
    /// Registry host → `username:password` (`<token>:…` for an identity token). Only these may be used to pull.
    pub registries: BTreeMap<String, SecretString>,
    /// The same, of the registries that is pushed to, where the installation has its own for them. No step of a build may
    /// come near them.
    pub push: BTreeMap<String, SecretString>,
    /// For `RUN --mount=type=secret`: id → content, base64.
    pub mounts: BTreeMap<String, SecretString>,
    /// Of a request that said how its workspace is to be.
    pub workspace: Option<WorkspaceRequest>,
}

/// What a request of image-builder-mk3's API says of the workspace that builds. Only an engine of workspaces looks at it.
#[derive(Clone, Debug)]
pub struct WorkspaceRequest {
    /// `contentservice.WorkspaceInitializer`, as protobuf, base64: it holds credentials.
    pub initializer: SecretString,
    /// The image of its supervisor.
    pub supervisor_ref: String,
}

/// An image that a FROM names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Base {
    #[serde(rename = "ref")]
    pub reference: String,
    /// What it was when it was built on, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<Digest>,
}

/// One platform's image of what was built.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct BuiltImage {
    pub platform: Platform,
    pub digest: Digest,
    /// Of config and layers, as they are moved.
    pub bytes: u64,
}

/// What a builder tells of its work, however it ended.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Findings {
    #[serde(default)]
    pub steps: Vec<Step>,
    #[serde(default)]
    pub bases: Vec<Base>,
    /// Of a build that succeeded.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub images: Vec<BuiltImage>,
    /// "buildah", "buildkit"; empty for a copy.
    #[serde(default)]
    pub build_tool: String,
}

/// What a builder leaves behind as its last act.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    pub result: RunResult,
    #[serde(default)]
    pub findings: Findings,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunResult {
    /// The digest that the builder PUT at the target.
    Pushed(Digest),
    Failed(Failure),
}

/// How a run that has ended was found. Nothing of it can still push.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ended {
    /// Absent where the builder was lost (killed, ended with its host, revoked) before it had one to write.
    pub outcome: Option<Outcome>,
    /// What the builder recorded before it PUT the target's tag: after a crash it tells whether the image at the
    /// target is this run's.
    pub recorded: Option<Digest>,
}

impl Ended {
    /// Whether its builder says that it ended because it was asked to.
    pub fn was_asked_to_stop(&self) -> bool {
        let result = self.outcome.as_ref().map(|outcome| &outcome.result);
        matches!(result, Some(RunResult::Failed(failure)) if *failure == Failure::asked_to_stop())
    }
}
