//! From the old API through a workspace that really builds to the image, and back.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use kiln_domain::reference::{Digest, ImageReference};
use kiln_proto::builder as mk3;
use kiln_proto::builder::image_builder_client::ImageBuilderClient;
use kiln_proto::kiln_v1 as api;
use kiln_proto::wsman::{WorkspacePhase, WorkspaceStatus};
use kiln_testkit::builders::Builders;
use kiln_testkit::installation::{Installation, program};
use kiln_testkit::registry::DockerRegistry;
use kiln_testkit::workshop::Workshop;
use kiln_testkit::ws_manager::WsManager;
use serde_json::{Value, json};

use super::{Place, by_id, next};
use crate::system::DOCKERFILE;
use crate::system::image_builder::{all, image, request, slow};

const ROLES: [&str; 4] = ["gateway", "resolver", "orchestrator", "log-relay"];

async fn place() -> Result<Place> {
    Place::set(&ROLES, |_| Ok(Arc::new(Builders::new(&program()?)?))).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_workspace_builds_and_its_image_can_be_read() -> Result<()> {
    let place = place().await?;
    let repository = place.workshop.repository(&[("Dockerfile", DOCKERFILE)], &["."])?;
    let mut client = place.client().await?;
    let mut stream = client.build(request(&repository)).await?.into_inner();
    let first = next(&mut stream).await?;
    ensure!(first.status() == mk3::BuildStatus::Running && !first.r#ref.is_empty(), "{first:?}");
    let second = next(&mut stream).await.with_context(|| place.fleet.log())?;
    let info = second.info.as_ref().context("info")?;
    let log_info = info.log_info.as_ref().context("log_info")?;
    ensure!(second.status() == mk3::BuildStatus::Running, "{second:?}");
    ensure!(log_info.url.starts_with(&format!("http://{}/", place.supervisors.address())), "{second:?}");
    let token = log_info.headers.get("x-gitpod-owner-token").context("no owner token")?;

    let log = place.log(by_id(&info.build_id)).await?;
    let rest = all(stream).await?;
    let [done] = rest.as_slice() else { anyhow::bail!("one message follows: {rest:?}") };
    let text = String::from_utf8_lossy(&log);
    ensure!(done.status() == mk3::BuildStatus::DoneSuccess, "{done:?}\n{text}\n{}", place.fleet.log());
    ensure!(text.contains("hello from the build"), "{text}");
    let run = log_info.url.rsplit('/').next().unwrap_or_default();
    ensure!(
        log == place.ws_manager.supervisors.output(run),
        "the log is another than the terminal's:\n{text}"
    );
    ensure!(place.ws_manager.running().is_empty(), "a workspace goes on");
    facade_reads(&place.workshop.registry, &done.r#ref).await?;

    // The same build in our own API; and of what it made, an image by reference.
    let request = api::BuildStatusRequest { id: info.build_id.clone() };
    let mut ours = place.fleet.clients().await?.into_iter().next().context("a gateway")?;
    let build = ours.build_status(request).await?.into_inner();
    ensure!(build.state() == api::BuildState::Succeeded && build.owner == "ann", "{build:?}");
    let of_ref = mk3::BuildRequest { source: Some(image(&done.base_ref)), ..Default::default() };
    let copied = all(client.build(of_ref).await?.into_inner()).await?;
    let last = copied.last().context("a message")?;
    ensure!(last.status() == mk3::BuildStatus::DoneSuccess, "{copied:?}\n{}", place.fleet.log());
    facade_reads(&place.workshop.registry, &last.r#ref).await?;

    // Nobody but the client has seen the owner token.
    ensure!(!place.fleet.log().contains(token.as_str()), "a process has told the owner token");
    let streams = place.fleet.nats.store();
    ensure!(contains(&streams, info.build_id.as_bytes())?, "the search finds what is there");
    ensure!(!contains(&streams, token.as_bytes())?, "the owner token lies in a stream");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn failures_and_cancels_of_workspaces_say_whose_they_are() -> Result<()> {
    let place = place().await?;
    let broken = format!("{DOCKERFILE}RUN [\"/bin/busybox\", \"false\"]\n");
    let repository = place.workshop.repository(&[("Dockerfile", &broken)], &["."])?;
    let failed = all(place.client().await?.build(request(&repository)).await?.into_inner()).await?;
    let done = failed.last().context("a message")?;
    ensure!(done.status() == mk3::BuildStatus::DoneFailure, "{failed:?}\n{}", place.fleet.log());
    // As Gitpod's server tells a user's mistake.
    ensure!(done.message.starts_with("build failed: headless task failed: "), "{done:?}");

    let repository = place.workshop.repository(&[("Dockerfile", &slow(600))], &["."])?;
    let mut stream = place.client().await?.build(request(&repository)).await?.into_inner();
    let id = next(&mut stream).await?.info.context("info")?.build_id;
    next(&mut stream).await.with_context(|| place.fleet.log())?;
    let mut ours = place.fleet.clients().await?.into_iter().next().context("a gateway")?;
    ours.cancel_build(api::CancelBuildRequest { id, reason: "enough".into() }).await?;
    let rest = all(stream).await?;
    let [done] = rest.as_slice() else { anyhow::bail!("one message follows: {rest:?}") };
    ensure!(done.message.starts_with("build failed: it was cancelled"), "{done:?}");
    ensure!(place.ws_manager.running().is_empty(), "a workspace goes on");

    // Under mk3's names: each started build is once done.
    let counted = place.fleet.process("orchestrator", 0)?.metrics().await?;
    for line in [
        "gitpod_image_builder_builds_started_total 2",
        "gitpod_image_builder_builds_done_total{success=\"false\"} 2",
        "gitpod_image_builder_builds_done_total{success=\"true\"} 0",
    ] {
        ensure!(counted.lines().any(|counted| counted == line), "{line}\n{counted}");
    }
    let counted = place.fleet.process("gateway", 0)?.metrics().await?;
    let handled = counted.lines().find(|line| line.starts_with("grpc_server_handled_total{"));
    let handled = handled.with_context(|| counted.clone())?;
    for label in ["grpc_method=\"Build\"", "grpc_code=\"OK\"", "grpc_service=\"builder.ImageBuilder\""] {
        ensure!(handled.contains(label), "{handled}");
    }
    ensure!(handled.ends_with(" 2"), "{handled}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_old_service_builds_is_listed_and_left_alone() -> Result<()> {
    let place = place().await?;
    let mut theirs =
        WorkspaceStatus { id: "9e3c1f5a-0000-4000-8000-0123456789ab".into(), ..Default::default() };
    theirs.set_phase(WorkspacePhase::Running);
    let annotations = [("managed-by", "image-builder"), ("ref", "r.test/w:1"), ("baseref", "r.test/b:1")];
    theirs.metadata.get_or_insert_default().annotations =
        annotations.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
    place.ws_manager.add(theirs.clone());
    let listed = place.client().await?.list_builds(mk3::ListBuildsRequest {}).await?.into_inner().builds;
    let [build] = listed.as_slice() else { anyhow::bail!("{listed:?}") };
    ensure!(build.build_id == theirs.id && build.r#ref == "r.test/w:1", "{build:?}");
    ensure!(build.base_ref == "r.test/b:1" && build.status() == mk3::BuildStatus::Running, "{build:?}");
    // A build of ours comes and goes beside it.
    let repository = place.workshop.repository(&[("Dockerfile", DOCKERFILE)], &["."])?;
    let built = all(place.client().await?.build(request(&repository)).await?.into_inner()).await?;
    ensure!(built.last().is_some_and(|last| last.status() == mk3::BuildStatus::DoneSuccess), "{built:?}");
    ensure!(place.ws_manager.running().iter().any(|status| status.id == theirs.id), "it was stopped");
    Ok(())
}

/// One machine, the old service's file: neither a registry nor builders of this host.
#[tokio::test(flavor = "multi_thread")]
async fn kiln_up_builds_at_the_ws_manager_that_mk3s_file_names() -> Result<()> {
    let (program, workshop) = (program()?, Workshop::new().await?);
    let ws_manager = WsManager::start(Arc::new(Builders::new(&program)?)).await?;
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("image-builder-mk3.json");
    let repository = |name: &str| format!("{}/gitpod/{name}", workshop.registry.address());
    let config = json!({
        "orchestrator": {
            "wsman": {"address": ws_manager.address.to_string()},
            "baseImageRepository": repository("base-images"),
            "workspaceImageRepository": repository("workspace-images"),
            "builderImage": "registry.test/bob:1"
        },
        "server": {"services": {"grpc": {"address": ":0"}}}
    });
    std::fs::write(&file, config.to_string())?;
    let kiln = Installation::start(&program, &["--config", file.to_str().context("a path")?]).await?;
    let source = workshop.repository(&[("Dockerfile", DOCKERFILE)], &["."])?;
    let mut client = ImageBuilderClient::connect(format!("http://{}", kiln.endpoint("grpc")?)).await?;
    let built = all(client.build(request(&source)).await?.into_inner()).await?;
    let done = built.last().context("a message")?;
    ensure!(done.status() == mk3::BuildStatus::DoneSuccess, "{built:?}\n{}", kiln.log());
    ensure!(done.r#ref.starts_with(&repository("workspace-images:")), "{done:?}");
    ensure!(ws_manager.starts() == 1, "it was built elsewhere");
    ensure!(kiln.endpoint("registry")? == workshop.registry.address(), "a registry of its own");
    ensure!(!kiln.data().join("runs").exists(), "a local engine");
    Ok(())
}

/// Reads an image as Gitpod's registry-facade does: a single manifest of a type that it knows, its config, every layer.
async fn facade_reads(registry: &DockerRegistry, reference: &str) -> Result<()> {
    let reference: ImageReference = reference.parse()?;
    let found = registry.manifest(reference.repository(), reference.selector()).await?;
    let (media_type, content) = found.context("there is no image")?;
    let known = [
        "application/vnd.oci.image.manifest.v1+json",
        "application/vnd.docker.distribution.manifest.v2+json",
    ];
    ensure!(known.contains(&media_type.as_str()), "{media_type}");
    let manifest: Value = serde_json::from_slice(&content)?;
    ensure!(manifest["schemaVersion"] == 2, "{manifest}");
    let layers = manifest["layers"].as_array().context("no layers")?;
    ensure!(!layers.is_empty(), "{manifest}");
    for descriptor in layers.iter().chain([&manifest["config"]]) {
        let digest: Digest = descriptor["digest"].as_str().context("no digest")?.parse()?;
        let blob = registry.blob(reference.repository(), &digest).await?.context("a blob is missing")?;
        ensure!(Digest::of(&blob) == digest && Some(blob.len() as u64) == descriptor["size"].as_u64());
    }
    let config: Digest = manifest["config"]["digest"].as_str().context("no config")?.parse()?;
    let config = registry.blob(reference.repository(), &config).await?.context("no config")?;
    let config: Value = serde_json::from_slice(&config)?;
    let diffs = config["rootfs"]["diff_ids"].as_array().context("no rootfs")?;
    ensure!(diffs.len() == layers.len() && config["architecture"] == "amd64", "{config}");
    Ok(())
}

/// Whether a file of a folder has this in it.
fn contains(folder: &Path, text: &[u8]) -> Result<bool> {
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        let found = match path.is_dir() {
            true => contains(&path, text)?,
            false => std::fs::read(&path)?.windows(text.len()).any(|window| window == text),
        };
        if found {
            return Ok(true);
        }
    }
    Ok(false)
}
