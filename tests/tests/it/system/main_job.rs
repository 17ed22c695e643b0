//! A git repository goes in, an image comes out, its log is followed and read again.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use futures::StreamExt as _;
use kiln_domain::reference::{Digest, ImageReference};
use kiln_proto::kiln_v1 as api;
use kiln_registry::{Access, OciRegistry, Registry as _};

use super::{DOCKERFILE, Stage, begun, dockerfile, image, is_over};

#[tokio::test(flavor = "multi_thread")]
async fn a_repository_becomes_an_image_and_its_log_is_read_twice() -> Result<()> {
    let mut stage = Stage::set().await?;
    let repository = stage.workshop.repository(&[("Dockerfile", DOCKERFILE)], &["."])?;
    let build = stage.begin(&repository.uri).await?;
    ensure!(build.commit == repository.commit && build.owner == "ann" && build.attempt == 1);
    // Followed while it builds, to its own end.
    let followed = stage.kiln.whole_log(&build.id).await?;
    let text = String::from_utf8_lossy(&followed);
    ensure!(text.contains("STEP 1/3: FROM scratch") && text.contains("hello from the build"), "{text}");

    let over = stage.kiln.until(&build.id, is_over).await?;
    ensure!(over.state() == api::BuildState::Succeeded, "{over:?}\n{text}");
    ensure!(over.engine == "local" && over.build_tool == "buildah" && over.attempt == 1);
    ensure!(
        over.steps.len() == 3 && over.steps.iter().all(|step| step.duration.is_some()),
        "{:?}",
        over.steps
    );
    let times = [&over.queued_at, &over.started_at, &over.finished_at]
        .map(|at| at.as_ref().map(|t| (t.seconds, t.nanos)));
    ensure!(times.iter().all(Option::is_some) && times.is_sorted(), "{times:?}");

    // What lies at the ref is what the record says.
    ensure!(lying(&over.r#ref).await? == Some(over.digest.parse()?));
    ensure!(lying(&over.base_ref).await?.is_some());

    // Read again: the same bytes; resumed at any offset: the rest of them.
    ensure!(stage.kiln.whole_log(&build.id).await? == followed);
    let mut client = stage.kiln.client().await?;
    for at in [0, 1, followed.len() / 2, followed.len()] {
        let start = Some(api::build_logs_request::Start::Offset(u64::try_from(at)?));
        let request = api::BuildLogsRequest { id: build.id.clone(), follow: true, start };
        let rest = read(client.build_logs(request).await?.into_inner()).await?;
        ensure!(Some(rest.as_slice()) == followed.get(at..), "from {at}");
    }
    let tail = Some(api::build_logs_request::Start::TailBytes(7));
    let request = api::BuildLogsRequest { id: build.id.clone(), follow: false, start: tail };
    ensure!(read(client.build_logs(request).await?.into_inner()).await? == followed[followed.len() - 7..]);
    let beyond = Some(api::build_logs_request::Start::Offset(u64::try_from(followed.len())? + 1));
    let request = api::BuildLogsRequest { id: build.id.clone(), follow: false, start: beyond };
    let error = read(client.build_logs(request).await?.into_inner()).await.unwrap_err();
    ensure!(
        error.downcast_ref::<tonic::Status>().map(tonic::Status::code) == Some(tonic::Code::OutOfRange),
        "{error:?}"
    );

    // Asked for again, it is there already.
    let again = stage.ask(dockerfile(&repository.uri, |_| {})).await?;
    let Some(api::build_image_response::Outcome::AlreadyBuilt(built)) = again.outcome else {
        anyhow::bail!("built again: {again:?}")
    };
    ensure!(built.r#ref == over.r#ref && built.digest == over.digest && built.base_ref == over.base_ref);

    // Listed, newest first, and read by its id.
    let listed = client.list_builds(api::ListBuildsRequest::default()).await?.into_inner().builds;
    ensure!(listed.len() == 1 && listed[0] == over);
    let request = api::BuildStatusRequest { id: build.id.clone() };
    ensure!(client.build_status(request).await?.into_inner() == over);
    let source = dockerfile(&repository.uri, |_| {}).source;
    let request = api::ResolveWorkspaceImageRequest { source, auth: None };
    let resolved = client.resolve_workspace_image(request).await?.into_inner();
    ensure!(resolved.exists && resolved.r#ref == over.r#ref && resolved.base_ref == over.base_ref);

    // A Dockerfile on top of it, with a build argument and a stage.
    let on_top = "ARG BASE\nFROM ${BASE} AS first\nARG WORD=none\n\
                  RUN [\"/bin/busybox\", \"sh\", \"-c\", \"echo word $WORD\"]\n\
                  FROM first AS second\nRUN [\"/bin/busybox\", \"false\"]\n";
    let repository = stage.workshop.repository(&[("docker/Dockerfile", on_top)], &[])?;
    let request = dockerfile(&repository.uri, |dockerfile| {
        dockerfile.path = "docker/Dockerfile".into();
        dockerfile.target = "first".into();
        dockerfile.build_args =
            [("BASE".to_owned(), over.r#ref.clone()), ("WORD".to_owned(), "kiln".to_owned())].into();
    });
    let build = begun(stage.ask(request).await?)?;
    let log = stage.kiln.whole_log(&build.id).await?;
    let over = stage.kiln.until(&build.id, is_over).await?;
    let log = String::from_utf8_lossy(&log);
    ensure!(over.state() == api::BuildState::Succeeded && log.contains("word kiln"), "{over:?}\n{log}");
    ensure!(stage.kiln.terminate().await?.success(), "{}", stage.kiln.log());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_becomes_a_copy_of_it() -> Result<()> {
    let stage = Stage::set().await?;
    let name = "team/base:1";
    let digest = stage.workshop.registry.push_image(name, "linux/amd64", &[("a", b"content")]).await?;
    let source = stage.workshop.registry.reference(name)?;
    let mut client = stage.kiln.client().await?;
    let request = api::ResolveBaseImageRequest { r#ref: source.to_string(), ..Default::default() };
    let resolved = client.resolve_base_image(request).await?.into_inner();
    ensure!(resolved.r#ref == source.pinned(&digest).to_string() && !resolved.stale);
    let build = begun(stage.ask(image(&source.to_string())).await?)?;
    ensure!(build.base_ref == resolved.r#ref);
    let over = stage.kiln.until(&build.id, is_over).await?;
    let log = stage.kiln.whole_log(&build.id).await?;
    ensure!(over.state() == api::BuildState::Succeeded, "{over:?}\n{}", String::from_utf8_lossy(&log));
    ensure!(over.digest == digest.as_str(), "a copy is the same manifest");
    ensure!(lying(&over.r#ref).await? == Some(digest));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failing_step_says_its_exit_code_and_whose_it_is() -> Result<()> {
    let stage = Stage::set().await?;
    let failing = format!("{DOCKERFILE}RUN [\"/bin/busybox\", \"sh\", \"-c\", \"exit 9\"]\n");
    let broken = "FROM scratch\nNONSENSE x\n";
    for (content, word) in [(failing.as_str(), "9"), (broken, "")] {
        let repository = stage.workshop.repository(&[("Dockerfile", content)], &["."])?;
        let build = stage.begin(&repository.uri).await?;
        let over = stage.kiln.until(&build.id, is_over).await?;
        let log = stage.kiln.whole_log(&build.id).await?;
        let log = String::from_utf8_lossy(&log);
        ensure!(over.state() == api::BuildState::Failed, "{over:?}\n{log}");
        ensure!(
            over.reason() == api::FailureReason::Dockerfile && over.message.contains(word),
            "{over:?}\n{log}"
        );
        ensure!(over.attempt == 1 && lying(&over.r#ref).await?.is_none());
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_build_ends_and_its_log_too() -> Result<()> {
    let stage = Stage::set().await?;
    let endless = format!("{DOCKERFILE}RUN [\"/bin/busybox\", \"sleep\", \"600\"]\n");
    let repository = stage.workshop.repository(&[("Dockerfile", &endless)], &["."])?;
    let build = stage.begin(&repository.uri).await?;
    let mut client = stage.kiln.client().await?;
    let request = api::BuildLogsRequest { id: build.id.clone(), follow: true, start: None };
    let mut chunks = client.clone().build_logs(request).await?.into_inner();
    let mut log = Vec::new();
    while !String::from_utf8_lossy(&log).contains("hello from the build") {
        log.extend(chunks.message().await?.context("the log ended")?.content);
    }
    let request = api::CancelBuildRequest { id: build.id.clone(), reason: "enough".into() };
    client.cancel_build(request).await?;
    let over = stage.kiln.until(&build.id, is_over).await?;
    ensure!(over.state() == api::BuildState::Cancelled && over.message == "enough", "{over:?}");
    read(chunks).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_callers_at_once_share_one_build() -> Result<()> {
    let stage = Stage::set().await?;
    let repository = stage.workshop.repository(&[("Dockerfile", DOCKERFILE)], &["."])?;
    let asked = (0..10).map(|_| stage.ask(dockerfile(&repository.uri, |_| {})));
    let answers = futures::future::try_join_all(asked).await?;
    ensure!(answers.iter().filter(|answer| !answer.joined).count() == 1);
    let builds: Vec<_> = answers.into_iter().map(begun).collect::<Result<_>>()?;
    ensure!(builds.iter().all(|build| build.id == builds[0].id));
    let logs =
        futures::future::try_join_all(builds.iter().map(|build| stage.kiln.whole_log(&build.id))).await?;
    ensure!(logs.iter().all(|log| *log == logs[0] && !log.is_empty()));
    // One terminal event, and no other build.
    let events =
        kiln_bus::events::subscribe(&stage.kiln.endpoint("nats")?, kiln_bus::events::From::Beginning).await?;
    let mut events = std::pin::pin!(events);
    let mut kinds = Vec::new();
    while let Some(event) = events.next().await {
        let event = event?;
        ensure!(event.build == builds[0].id);
        kinds.push(event.kind.clone());
        if event.data["state"] == "SUCCEEDED" {
            break;
        }
    }
    ensure!(kinds.iter().filter(|kind| kind.contains("queued")).count() == 1, "{kinds:?}");
    ensure!(kinds.iter().filter(|kind| kind.contains("started")).count() == 1, "{kinds:?}");
    Ok(())
}

/// What the registry itself says lies at a reference.
async fn lying(reference: &str) -> Result<Option<Digest>> {
    let reference: ImageReference = reference.parse()?;
    let access = Access::anonymous(Duration::from_secs(10));
    Ok(OciRegistry::default().digest(&reference, &access).await?)
}

async fn read(mut chunks: tonic::Streaming<api::LogChunk>) -> Result<Vec<u8>> {
    let mut log = Vec::new();
    while let Some(chunk) = chunks.message().await? {
        log.extend(chunk.content);
    }
    Ok(log)
}
