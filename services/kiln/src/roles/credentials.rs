//! The credentials of the installation, for the roles that use them.

use std::sync::Arc;

use anyhow::anyhow;
use kiln_credentials::Installation;
use prometheus_client::registry::Registry;

use crate::config::Config;

pub(crate) async fn open(config: &Config, metrics: &mut Registry) -> anyhow::Result<Arc<Installation>> {
    let opened = Installation::open(&config.credentials, metrics).await;
    opened.map(Arc::new).map_err(|problem| anyhow!("`credentials.{problem}`"))
}
