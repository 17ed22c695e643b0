//! The credentials of an installation: where they come from, and which a request may use.
//!
//! - I am asked by the resolver and the orchestrator, through the port [`Keychain`] of `kiln-registry`.
//! - I ask the Docker config file, which is read anew when it changes, and the credential helpers that it names; the AWS
//!   API, and the metadata services of Google and Azure.
//! - I never send a credential anywhere, give one for a registry that is only named alike, run a helper by a shell or a
//!   path, or say in a log or an error what a helper or the file holds.

mod azure;
mod config;
mod docker_config;
mod ecr;
mod file;
mod google;
mod helper;
mod kept;
mod metrics;
mod permission;
mod source;
mod web;

use async_trait::async_trait;
use kiln_registry::{Credential, Error, Keychain};
use prometheus_client::registry::Registry as MetricsRegistry;

use crate::azure::Azure;
pub use crate::config::Config;
use crate::ecr::Ecr;
use crate::file::ConfigFile;
use crate::google::Google;
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
            let file = ConfigFile::open(path.clone(), config.helpers(), metrics.clone()).await;
            sources.push(Box::new(file.map_err(|problem| format!("docker_config: {problem}"))?));
        }
        if let Some(ecr) = &config.ecr {
            sources.push(Box::new(Ecr::new(ecr.clone(), metrics.clone())));
        }
        if let Some(google) = &config.google {
            let google = Google::new(google.clone(), metrics.clone());
            sources.push(Box::new(google.map_err(|problem| format!("google: {problem}"))?));
        }
        if let Some(azure) = &config.azure {
            let azure = Azure::new(azure.clone(), metrics);
            sources.push(Box::new(azure.map_err(|problem| format!("azure: {problem}"))?));
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
