//! A client in another language, generated from the protocol.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use kiln_testkit::builders::Builders;
use kiln_testkit::installation::program;
use kiln_testkit::workshop::tools_folder;
use tokio::process::Command;

use super::{Place, SOON};
use crate::system::DOCKERFILE;

#[tokio::test(flavor = "multi_thread")]
async fn a_python_client_runs_every_call() -> Result<()> {
    let roles = ["gateway", "resolver", "orchestrator", "log-relay"];
    let place = Place::set(&roles, |_| Ok(Arc::new(Builders::new(&program()?)?))).await?;
    let repository = place.workshop.repository(&[("Dockerfile", DOCKERFILE)], &["."])?;
    let registry = &place.workshop.registry;
    registry.push_image("base:1", "linux/amd64", &[("file", b"content")]).await?;
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    let python = tools_folder().context("no folder of tools")?.join("python3-with-grpc");
    let mut client = Command::new(python);
    client
        .arg(tests.join("clients/image_builder.py"))
        .arg(tests.with_file_name("proto"))
        .arg(place.fleet.process("gateway", 0)?.grpc().to_string())
        .arg(registry.reference("base:1")?.to_string())
        .arg(&repository.uri)
        .kill_on_drop(true);
    let ran = tokio::time::timeout(SOON, client.output()).await.context("the client does not end")?;
    let ran = ran.context("there is no Python with grpcio: scripts/bootstrap --tests brings it")?;
    let said = [ran.stdout.as_slice(), &ran.stderr].concat();
    ensure!(ran.status.success(), "{}\n{}", String::from_utf8_lossy(&said), place.fleet.log());
    Ok(())
}
