//! What the tests share: a connection to a private server with its streams made.

use anyhow::Result;
use kiln_bus::layout::Layout;
use kiln_bus::{Bus, Connect};
use kiln_domain::id::InstanceId;

/// A connection to the server at `url`.
pub(crate) async fn connect(url: &str) -> Result<Bus> {
    Ok(Connect { url: url.to_owned(), user: None, password: None, name: "test".into() }.connect().await?)
}

/// A connection, and the streams and buckets made.
pub(crate) async fn provisioned(url: &str, replicas: usize) -> Result<Bus> {
    let bus = connect(url).await?;
    bus.provision(&layout(replicas)).await?;
    Ok(bus)
}

/// Streams that fit a small disk.
pub(crate) fn layout(replicas: usize) -> Layout {
    Layout { replicas, journal_max_bytes: 256 << 20, logs_max_bytes: 256 << 20, ..Layout::default() }
}

pub(crate) fn instance(n: u64) -> Result<InstanceId> {
    Ok(InstanceId::new("orchestrator", n)?)
}
