//! The credentials of an installation: where they come from, and which a request may use.
//!
//! - I am asked by the resolver and the orchestrator, through the port [`Keychain`] of `kiln-registry`.
//! - I ask the Docker config file, which is read anew when it changes, and the credential helpers that it names.
//! - I never send a credential anywhere, give one for a registry that is only named alike, run a helper by a shell or a
//!   path, or say in a log or an error what a helper or the file holds.

mod config;
mod docker_config;
mod file;
mod helper;
mod metrics;
mod permission;
mod source;

use async_trait::async_trait;
use kiln_registry::{Credential, Error, Keychain};
use prometheus_client::registry::Registry as MetricsRegistry;

pub use crate::config::Config;
use crate::file::ConfigFile;
use crate::metrics::Metrics;
pub use crate::permission::{Owner, Permission, Permitted};
use crate::source::Source;

/// All that an installation has; by default nothing.
#[derive(Default)]
pub struct Installation {
    /// The first that has a credential for a registry gives it.
    sources: Vec<Box<dyn Source>>,
}

impl Installation {
    /// Reads what is to be read. An error names the key of the configuration, and what is wrong.
    pub async fn open(config: &Config, metrics: &mut MetricsRegistry) -> Result<Self, String> {
        let metrics = Metrics::register(metrics);
        let mut sources: Vec<Box<dyn Source>> = Vec::new();
        if let Some(path) = &config.docker_config {
            let file = ConfigFile::open(path.clone(), config.helpers(), metrics).await;
            sources.push(Box::new(file.map_err(|problem| format!("docker_config: {problem}"))?));
        }
        Ok(Self { sources })
    }

    /// Whether there may be a credential for a registry. Asks nobody.
    pub async fn serves(&self, registry: &str) -> bool {
        for source in &self.sources {
            if source.serves(registry).await {
                return true;
            }
        }
        false
    }

    /// The registries that are known by name.
    pub async fn registries(&self) -> Vec<String> {
        let mut registries = Vec::new();
        for source in &self.sources {
            registries.extend(source.registries().await);
        }
        registries
    }
}

#[async_trait]
impl Keychain for Installation {
    async fn credential(&self, registry: &str) -> Result<Option<Credential>, Error> {
        for source in &self.sources {
            if source.serves(registry).await
                && let Some(credential) = source.credential(registry).await?
            {
                return Ok(Some(credential));
            }
        }
        Ok(None)
    }
}
