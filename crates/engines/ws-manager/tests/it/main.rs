//! The ws-manager engine with a ws-manager and supervisors after the protocol, and a real registry.

mod accesses;
mod order;
mod outputs;
mod place;
mod statuses;
mod tls;

use kiln_testkit::engine_conformance::conformance;

use crate::place::WsManagerPlace;

#[tokio::test(flavor = "multi_thread")]
async fn it_conforms() -> anyhow::Result<()> {
    conformance(&WsManagerPlace::new().await?).await
}
