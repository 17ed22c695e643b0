//! The port to whatever an installation's credentials come from.

use async_trait::async_trait;
use kiln_registry::{Credential, Error};

#[async_trait]
pub(crate) trait Source: Send + Sync {
    /// Whether it may have a credential for a registry. Asks nobody.
    async fn serves(&self, registry: &str) -> bool;

    async fn credential(&self, registry: &str) -> Result<Option<Credential>, Error>;

    /// The registries that it knows by name; it may serve more.
    async fn registries(&self) -> Vec<String>;
}

pub(crate) fn cannot_be_had(registry: &str, problem: impl Into<String>) -> Error {
    Error::NoCredential { registry: registry.to_owned(), problem: problem.into() }
}
