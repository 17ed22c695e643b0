//! The seam between a run and what executes the Dockerfile.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use async_trait::async_trait;
use kiln_domain::failure::{Failure, FailureReason};
use kiln_domain::layer_cache::CacheRefs;
use kiln_domain::platform::Platform;
use kiln_domain::reference::{Digest, ImageReference};
use kiln_domain::registries::Registries;

use crate::export::Export;

/// How the registries that a Dockerfile is built with are reached.
pub(crate) struct Ways<'a> {
    pub(crate) registries: &'a Registries,
    /// Those that its images are from, their mirrors included.
    pub(crate) pulled_from: BTreeSet<&'a str>,
    pub(crate) pushed_to: &'a str,
}

/// What is to be built.
#[derive(Clone, Debug)]
pub struct BuildRequest {
    pub dockerfile: PathBuf,
    /// The context's folder.
    pub context: PathBuf,
    pub build_args: BTreeMap<String, String>,
    /// The stage to build; empty for the last one.
    pub target: String,
    pub no_cache: bool,
    /// One image for each, in one index where there are several.
    pub platforms: Vec<Platform>,
    pub provenance: bool,
    /// The time, in seconds since 1970, that every file gets.
    pub source_date_epoch: Option<u64>,
    /// The images that it names: those of FROM lines, and those that files come from.
    pub images: Vec<ImageReference>,
    /// The git remote that it comes from, and the Dockerfile's path there.
    pub repository: String,
    pub path: String,
    /// Where the image is going to be pushed.
    pub push_to: ImageReference,
    /// Where layers of earlier builds may be found, and its own are to be left.
    pub cache: Option<CacheRefs>,
}

/// An image that a build tool has made and keeps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Built {
    /// The tool's own name for it.
    pub image: String,
}

/// Why a build tool could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    /// A registry refuses connections: it may help to try again.
    #[error("{failure}")]
    Refused {
        /// Which one (`host[:port]`), where the tool told.
        registry: Option<String>,
        failure: Failure,
    },
    #[error("{0}")]
    Failed(Failure),
    /// What the tool works with is gone; another run of the build may succeed.
    #[error("{0}")]
    Lost(String),
}

impl ToolError {
    /// What the user is told when it isn't tried again.
    pub fn into_failure(self) -> Failure {
        match self {
            Self::Refused { failure, .. } | Self::Failed(failure) => failure,
            Self::Lost(problem) => Failure::new(FailureReason::EngineLost, problem),
        }
    }
}

/// Executes a Dockerfile, and pushes what came out. One build at a time.
#[async_trait]
pub trait BuildTool: Send + Sync {
    /// "buildah", "buildkit".
    fn name(&self) -> &'static str;

    /// Executes the Dockerfile; the steps go to the run's output.
    async fn build(&self, request: &BuildRequest) -> Result<Built, ToolError>;

    /// What is to be done of the build that has succeeded last, once this builder has ended.
    fn export(&self) -> Option<Export> {
        None
    }

    /// Pushes a built image, and gives the digest that it has in the registry.
    async fn push(&self, built: &Built, to: &ImageReference) -> Result<Digest, ToolError>;

    /// The digest that an image had when it was last pulled here, where that is known.
    async fn digest(&self, image: &ImageReference) -> Option<Digest>;

    /// Removes what a build left that is of no use any more: containers, mounts, an image that no later build can use.
    /// Nothing of the run builds any more. False if something is left.
    async fn clear(&self, built: Option<&Built>) -> bool;
}

/// The longest argument that Linux takes.
const ARGUMENT_BYTES: usize = 128 * 1024 - 1;

/// Build args are arguments of a build tool: that one of this `name` is short enough.
pub(crate) fn check_argument(name: &str, argument: &str) -> Result<(), ToolError> {
    if argument.len() <= ARGUMENT_BYTES {
        return Ok(());
    }
    let message =
        format!("build arg {name} is longer than the {ARGUMENT_BYTES} bytes that a build tool takes");
    Err(ToolError::Failed(Failure::new(FailureReason::Dockerfile, message)))
}
