//! The local engine with the real builder, git, buildah and registry.

mod kills;
mod place;

use kiln_testkit::engine_conformance::conformance;

use crate::place::LocalPlace;

#[tokio::test(flavor = "multi_thread")]
async fn it_conforms() -> anyhow::Result<()> {
    conformance(&LocalPlace::new().await?).await
}
