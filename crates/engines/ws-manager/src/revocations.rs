//! Which runs must not be started any more. ws-manager forgets a workspace that has stopped, so somebody else has to know.

use async_trait::async_trait;
use kiln_domain::engine::EngineError;
use kiln_domain::id::RunId;

/// What was decided of a run for good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mark {
    /// Nobody may start it.
    Revoked,
    /// Nor is anything of it wanted any more.
    Removed,
}

/// A memory that every process of an installation shares, of about a day.
#[async_trait]
pub trait Revocations: Send + Sync {
    async fn get(&self, run: &RunId) -> Result<Option<Mark>, EngineError>;

    /// Returns once every process would see it.
    async fn put(&self, run: &RunId, mark: Mark) -> Result<(), EngineError>;
}
