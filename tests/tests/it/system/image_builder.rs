//! The API of image-builder-mk3, driven as its clients drive it, beside our own: both see the same builds.

use anyhow::{Context as _, Result, ensure};
use futures::future::join_all;
use kiln_domain::hash;
use kiln_domain::source::DockerfileSource;
use kiln_proto::builder as mk3;
use kiln_proto::builder::build_source::From;
use kiln_proto::builder::image_builder_client::ImageBuilderClient;
use kiln_proto::contentservice as content;
use kiln_proto::kiln_v1 as api;
use kiln_testkit::installation::{Installation, program};
use kiln_testkit::registry::DockerRegistry;
use kiln_testkit::workshop::{Repository, Workshop};
use serde_json::json;
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};

use super::{DOCKERFILE, Stage, is_over};

/// A request as Gitpod's server makes it: the repository is checked out in a folder of the workspace, and the paths begin
/// there.
pub(crate) fn request(repository: &Repository) -> mk3::BuildRequest {
    let git = content::GitInitializer {
        remote_uri: repository.uri.clone(),
        target_mode: content::CloneTargetMode::RemoteBranch.into(),
        clone_taget: "main".into(),
        checkout_location: "repo".into(),
        ..Default::default()
    };
    let spec = content::workspace_initializer::Spec::Git(git);
    let file = mk3::BuildSourceDockerfile {
        source: Some(content::WorkspaceInitializer { spec: Some(spec) }),
        dockerfile_version: "abc".into(),
        dockerfile_path: "repo/Dockerfile".into(),
        context_path: "repo".into(),
    };
    mk3::BuildRequest {
        source: Some(mk3::BuildSource { from: Some(From::File(file)) }),
        triggered_by: "ann".into(),
        ..Default::default()
    }
}

pub(crate) fn image(reference: &str) -> mk3::BuildSource {
    mk3::BuildSource { from: Some(From::Ref(mk3::BuildSourceReference { r#ref: reference.into() })) }
}

/// A step that takes some seconds, and says when it has begun.
pub(crate) fn slow(seconds: u32) -> String {
    let step = format!("echo begun; /bin/busybox sleep {seconds}");
    format!("{DOCKERFILE}RUN [\"/bin/busybox\", \"sh\", \"-c\", \"{step}\"]\n")
}

#[tokio::test(flavor = "multi_thread")]
async fn mk3s_own_configuration_file_is_taken_as_it_is() -> Result<()> {
    let registry = DockerRegistry::start().await?;
    let repository = |name: &str| format!("{}/gitpod/{name}", registry.address());
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("image-builder-mk3.json");
    let config = json!({
        "orchestrator": {
            "baseImageRepository": repository("base-images"),
            "workspaceImageRepository": repository("workspace-images"),
            "builderImage": "registry.test/bob:1"
        },
        "refCache": {"interval": "6h0m0s", "refs": []},
        "server": {"services": {"grpc": {"address": ":0"}}, "debug": {"colour": "red"}}
    });
    std::fs::write(&file, config.to_string())?;
    let arguments = ["--config", file.to_str().context("a path")?];
    let kiln = Installation::start(&program()?, &arguments).await?;
    let stage = Stage { kiln, workshop: Workshop::new().await? };
    ensure!(stage.kiln.endpoint("registry")? == registry.address(), "no registry of its own");
    let log = stage.kiln.log();
    for key in ["orchestrator.builderImage", "refCache.interval", "server.debug.colour"] {
        ensure!(log.contains(&format!("`{key}`")), "{key} is not named:\n{log}");
    }
    let source = stage.workshop.repository(&[("Dockerfile", DOCKERFILE)], &["."])?;
    let built = all(client(&stage).await?.build(request(&source)).await?.into_inner()).await?;
    let done = built.last().context("a message")?;
    ensure!(done.status() == mk3::BuildStatus::DoneSuccess, "{built:?}");
    ensure!(done.r#ref.starts_with(&repository("workspace-images:")), "{done:?}");
    ensure!(done.base_ref.starts_with(&repository("base-images:")), "{done:?}");
    Ok(())
}

async fn client(stage: &Stage) -> Result<ImageBuilderClient<Channel>> {
    let address = format!("http://{}", stage.kiln.endpoint("grpc")?);
    Ok(ImageBuilderClient::new(Channel::from_shared(address)?.connect().await?))
}

pub(crate) async fn all(
    mut stream: Streaming<mk3::BuildResponse>,
) -> Result<Vec<mk3::BuildResponse>, Status> {
    let mut responses = Vec::new();
    while let Some(response) = stream.message().await? {
        responses.push(response);
    }
    Ok(responses)
}

async fn log_of(stage: &Stage, request: mk3::LogsRequest) -> Result<Vec<u8>> {
    let mut chunks = client(stage).await?.logs(request).await?.into_inner();
    let mut log = Vec::new();
    while let Some(chunk) = chunks.message().await? {
        log.extend(chunk.content);
    }
    Ok(log)
}

/// The refs that mk3 would compute.
fn refs(stage: &Stage, repository: &Repository) -> Result<(String, String)> {
    let registry = stage.kiln.endpoint("registry")?;
    let source = DockerfileSource {
        remote_uri: repository.uri.clone(),
        revision: "main".into(),
        path: "repo/Dockerfile".into(),
        context_path: "repo".into(),
        version: "abc".into(),
        build_args: Default::default(),
        target: String::new(),
        platform: None,
        platforms: Vec::new(),
        provenance: false,
        reproducible: false,
        checkout_location: None,
        unknown: Default::default(),
    };
    let base = hash::base_ref(&format!("{registry}/base-images"), &source, "main");
    let target = hash::workspace_ref(&format!("{registry}/workspace-images"), &base);
    Ok((base, target))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_build_is_one_and_the_same_in_both_apis() -> Result<()> {
    let stage = Stage::set().await?;
    let repository = stage.workshop.repository(&[("Dockerfile", DOCKERFILE)], &["."])?;
    let (base, target) = refs(&stage, &repository)?;
    let request = request(&repository);
    let mut client = client(&stage).await?;
    let ask = mk3::ResolveWorkspaceImageRequest { source: request.source.clone(), ..Default::default() };
    let image_before = client.resolve_workspace_image(ask.clone()).await?.into_inner();
    ensure!(image_before.r#ref == target && image_before.status() == mk3::BuildStatus::Unknown);

    let mut stream = client.build(request.clone()).await?.into_inner();
    let running = stream.message().await?.context("a first message")?;
    ensure!(running.status() == mk3::BuildStatus::Running, "{running:?}");
    ensure!((&running.r#ref, &running.base_ref) == (&target, &base), "{running:?}");
    let info = running.info.context("info")?;
    let listed = client.list_builds(mk3::ListBuildsRequest {}).await?.into_inner().builds;
    ensure!(
        listed.iter().any(|build| build.build_id == info.build_id && build.r#ref == target),
        "{listed:?}"
    );

    // Its log by the ref, followed to its own end; then by the id, and through our own API.
    let by_ref = mk3::LogsRequest { build_ref: target.clone(), ..Default::default() };
    let followed = log_of(&stage, by_ref).await?;
    let over = stage.kiln.until(&info.build_id, is_over).await?;
    let text = String::from_utf8_lossy(&followed);
    ensure!(over.state() == api::BuildState::Succeeded && over.owner == "ann", "{over:?}\n{text}");
    ensure!(over.commit == repository.commit, "{over:?}");
    ensure!(followed == stage.kiln.whole_log(&info.build_id).await?);
    let by_id = mk3::LogsRequest { build_id: info.build_id.clone(), ..Default::default() };
    ensure!(log_of(&stage, by_id.clone()).await? == followed);
    let censored = log_of(&stage, mk3::LogsRequest { censored: true, ..by_id }).await?;
    let censored = String::from_utf8_lossy(&censored);
    ensure!(text.contains(&base) && !censored.contains(&base) && !censored.contains(&target), "{censored}");

    let rest = all(stream).await?;
    let [done] = rest.as_slice() else { anyhow::bail!("one message follows: {rest:?}") };
    ensure!(done.status() == mk3::BuildStatus::DoneSuccess && done.r#ref == target && done.base_ref == base);
    ensure!(client.list_builds(mk3::ListBuildsRequest {}).await?.into_inner().builds.is_empty());

    // There it is: one message, and no build.
    let found = all(client.build(request).await?.into_inner()).await?;
    let expected = mk3::BuildResponse {
        r#ref: target.clone(),
        status: mk3::BuildStatus::DoneSuccess.into(),
        base_ref: base.clone(),
        ..Default::default()
    };
    ensure!(found == [expected.clone()], "{found:?}");
    // Of a base that an earlier answer named nothing else is asked: its own source is nowhere.
    let resolved = mk3::BuildRequest {
        source: Some(image("127.0.0.1:1/nowhere:1")),
        base_image_name_resolved: base.clone(),
        ..Default::default()
    };
    ensure!(all(client.build(resolved).await?.into_inner()).await? == [expected]);
    let image_after = client.resolve_workspace_image(ask).await?.into_inner();
    ensure!(image_after.status() == mk3::BuildStatus::DoneSuccess && image_after.base_ref == base);

    // The base by its digest, as it lies in the registry, and a workspace image of that.
    let ask =
        mk3::ResolveBaseImageRequest { r#ref: base.clone(), use_retry_client: true, ..Default::default() };
    let pinned = client.resolve_base_image(ask).await?.into_inner().r#ref;
    ensure!(
        pinned.starts_with(base.split_once(":").map_or("", |(host, _)| host)) && pinned.contains("@sha256:")
    );
    let of_ref = mk3::BuildRequest { source: Some(image(&base)), ..Default::default() };
    let copied = all(client.build(of_ref).await?.into_inner()).await?;
    let statuses: Vec<_> = copied.iter().map(mk3::BuildResponse::status).collect();
    ensure!(statuses == [mk3::BuildStatus::Running, mk3::BuildStatus::DoneSuccess], "{copied:?}");
    ensure!(copied.iter().all(|response| response.base_ref == pinned), "{copied:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn two_forced_builds_at_once_are_one_that_goes_on_without_its_clients() -> Result<()> {
    let stage = Stage::set().await?;
    let repository = stage.workshop.repository(&[("Dockerfile", &slow(3))], &["."])?;
    let request = mk3::BuildRequest { force_rebuild: true, ..request(&repository) };
    let mut gone = client(&stage).await?.build(request.clone()).await?.into_inner();
    let first = gone.message().await?.context("a first message")?.info.context("info")?;
    drop(gone);
    let both = join_all((0..2).map(async |_| -> Result<_> {
        Ok(all(client(&stage).await?.build(request.clone()).await?.into_inner()).await?)
    }));
    for responses in both.await {
        let responses = responses?;
        let statuses: Vec<_> = responses.iter().map(mk3::BuildResponse::status).collect();
        ensure!(statuses == [mk3::BuildStatus::Running, mk3::BuildStatus::DoneSuccess], "{responses:?}");
        let ids = responses.iter().filter_map(|response| response.info.as_ref());
        ensure!(ids.clone().count() == 2 && ids.clone().all(|info| info.build_id == first.build_id));
    }
    let over = stage.kiln.until(&first.build_id, is_over).await?;
    ensure!(over.attempt == 1 && over.state() == api::BuildState::Succeeded, "{over:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_whose_gateway_ends_is_told_to_come_again_and_joins() -> Result<()> {
    let mut stage = Stage::set().await?;
    let repository = stage.workshop.repository(&[("Dockerfile", &slow(4))], &["."])?;
    let request = request(&repository);
    let mut stream = client(&stage).await?.build(request.clone()).await?.into_inner();
    let before = stream.message().await?.context("a first message")?.info.context("info")?;
    stage.kiln.terminate().await?;
    let status = all(stream).await.err().context("the stream ends with an error")?;
    ensure!(status.code() == Code::Unavailable, "{status:?}");
    stage.kiln.start_again().await?;
    let again = all(client(&stage).await?.build(request).await?.into_inner()).await?;
    let ids: Vec<_> = again.iter().filter_map(|response| Some(&response.info.as_ref()?.build_id)).collect();
    ensure!(ids == [&before.build_id; 2], "{again:?}");
    ensure!(again.last().map(mk3::BuildResponse::status) == Some(mk3::BuildStatus::DoneSuccess), "{again:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn failures_and_cancels_say_whose_they_are() -> Result<()> {
    let stage = Stage::set().await?;
    let broken = format!("{DOCKERFILE}RUN [\"/bin/busybox\", \"false\"]\n");
    let repository = stage.workshop.repository(&[("Dockerfile", &broken)], &["."])?;
    let failed = all(client(&stage).await?.build(request(&repository)).await?.into_inner()).await?;
    let statuses: Vec<_> = failed.iter().map(mk3::BuildResponse::status).collect();
    ensure!(statuses == [mk3::BuildStatus::Running, mk3::BuildStatus::DoneFailure], "{failed:?}");
    ensure!(failed.last().is_some_and(|last| last.message.starts_with("build failed: ")), "{failed:?}");

    // Cancelled through our own API.
    let repository = stage.workshop.repository(&[("Dockerfile", &slow(60))], &["."])?;
    let mut stream = client(&stage).await?.build(request(&repository)).await?.into_inner();
    let info = stream.message().await?.context("a first message")?.info.context("info")?;
    let cancel = api::CancelBuildRequest { id: info.build_id, reason: "enough".into() };
    stage.kiln.client().await?.cancel_build(cancel).await?;
    let rest = all(stream).await?;
    let [done] = rest.as_slice() else { anyhow::bail!("one message follows: {rest:?}") };
    ensure!(done.status() == mk3::BuildStatus::DoneFailure, "{done:?}");
    ensure!(done.message.starts_with("build failed: it was cancelled"), "{done:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_have_mk3s_codes_and_texts() -> Result<()> {
    let stage = Stage::set().await?;
    let registry = stage.kiln.endpoint("registry")?;
    let mut client = client(&stage).await?;
    stage.workshop.registry.push_image("arm:1", "linux/arm64", &[("a", b"a")]).await?;
    let arm = stage.workshop.registry.reference("arm:1")?.to_string();
    let beginning = "cannt resolve base image ref: cannot parse image ref: ";
    for (reference, code, expected) in [
        ("UPPER/x", Code::InvalidArgument, beginning),
        ("https://r.test/x", Code::InvalidArgument, beginning),
        (&format!("{registry}/nothing:1"), Code::NotFound, "cannot resolve image"),
        (&arm, Code::NotFound, "cannot resolve image: no manifest for platform linux-amd64 found"),
        ("127.0.0.1:1/x:1", Code::Unavailable, "cannot resolve image: "),
        ("r.invalid/x:1", Code::NotFound, "cannot resolve image: "),
    ] {
        let ask = mk3::ResolveBaseImageRequest { r#ref: reference.into(), ..Default::default() };
        let status = client.resolve_base_image(ask).await.err().context("an error")?;
        ensure!(status.code() == code && status.message().starts_with(expected), "{reference}: {status:?}");
        // A build of it, and its workspace image, are refused likewise.
        let source = Some(image(reference));
        let ask = mk3::BuildRequest { source: source.clone(), ..Default::default() };
        let status = client.build(ask).await.err().context("an error")?;
        ensure!(status.code() == code && status.message().starts_with(expected), "{reference}: {status:?}");
        let ask = mk3::ResolveWorkspaceImageRequest { source, ..Default::default() };
        let status = client.resolve_workspace_image(ask).await.err().context("an error")?;
        ensure!(status.code() == code && status.message().starts_with(expected), "{reference}: {status:?}");
    }
    let status = client.build(mk3::BuildRequest::default()).await.err().context("an error")?;
    ensure!(status.code() == Code::InvalidArgument && status.message() == "build source is missing");
    let ask = mk3::ResolveWorkspaceImageRequest::default();
    let status = client.resolve_workspace_image(ask).await.err().context("an error")?;
    ensure!(status.code() == Code::InvalidArgument && status.message() == "build source is missing");
    for (build_ref, build_id) in [("r.test/x:1", ""), ("", "nothing"), ("", "")] {
        let ask =
            mk3::LogsRequest { build_ref: build_ref.into(), build_id: build_id.into(), ..Default::default() };
        let status = client.logs(ask).await.err().context("an error")?;
        ensure!(status.code() == Code::NotFound && status.message() == "build not found", "{status:?}");
    }
    // A repository that isn't there is the user's mistake.
    let mut repository = stage.workshop.repository(&[("Dockerfile", DOCKERFILE)], &["."])?;
    repository.uri.push_str("-nowhere");
    let status = client.build(request(&repository)).await.err().context("an error")?;
    ensure!(status.message().starts_with("cannot start build: headless task failed: "), "{status:?}");
    Ok(())
}
