//! Killed while a build runs and started again: the builder is adopted, and the build ends as if nothing had been.

use anyhow::{Context as _, Result, ensure};
use kiln_proto::kiln_v1 as api;

use super::{DOCKERFILE, Stage, is_over};

/// A step that says two lines, some seconds apart: time enough for a restart between them.
fn slow(seconds: u32) -> String {
    let step = format!("echo before; busybox sleep {seconds}; echo after");
    format!("{DOCKERFILE}RUN [\"/bin/busybox\", \"sh\", \"-c\", \"{step}\"]\n")
        .replace("busybox sleep", "/bin/busybox sleep")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_build_outlives_kiln_up_killed_and_started_again() -> Result<()> {
    let mut stage = Stage::set().await?;
    let repository = stage.workshop.repository(&[("Dockerfile", &slow(4))], &["."])?;
    let build = stage.begin(&repository.uri).await?;
    let request = api::BuildLogsRequest { id: build.id.clone(), follow: true, start: None };
    let mut chunks = stage.kiln.client().await?.build_logs(request).await?.into_inner();
    let mut log = Vec::new();
    while !String::from_utf8_lossy(&log).contains("before") {
        log.extend(chunks.message().await?.context("the log ended")?.content);
    }
    let (grpc, registry) = (stage.kiln.endpoint("grpc")?, stage.kiln.endpoint("registry")?);
    stage.kiln.kill().await?;
    stage.kiln.start_again().await?;
    ensure!(stage.kiln.endpoint("grpc")? == grpc && stage.kiln.endpoint("registry")? == registry);
    let whole = stage.kiln.whole_log(&build.id).await?;
    let text = String::from_utf8_lossy(&whole);
    let over = stage.kiln.until(&build.id, is_over).await?;
    ensure!(over.state() == api::BuildState::Succeeded && over.attempt == 1, "{over:?}\n{text}");
    ensure!(whole.starts_with(&log), "what was read before is what stands there now");
    for line in ["before", "after", "hello from the build"] {
        let lines = text.lines().filter(|l| *l == line).count();
        ensure!(lines == 1, "`{line}` {lines} times:\n{text}");
    }
    Ok(())
}

/// The registry dies with Kiln: the builder's push is refused, and goes on when it is back.
#[tokio::test(flavor = "multi_thread")]
async fn a_build_that_pushes_outlives_kiln_up_killed_and_started_again() -> Result<()> {
    let mut stage = Stage::set().await?;
    let large = format!(
        "{DOCKERFILE}RUN [\"/bin/busybox\", \"dd\", \"if=/dev/urandom\", \"of=/large\", \"bs=1M\", \"count=64\"]\n"
    );
    let repository = stage.workshop.repository(&[("Dockerfile", &large)], &["."])?;
    let build = stage.begin(&repository.uri).await?;
    let request = api::BuildLogsRequest { id: build.id.clone(), follow: true, start: None };
    let mut chunks = stage.kiln.client().await?.build_logs(request).await?.into_inner();
    let mut log = Vec::new();
    while !String::from_utf8_lossy(&log).contains("kiln: pushing") {
        log.extend(chunks.message().await?.context("the log ended")?.content);
    }
    stage.kiln.kill().await?;
    stage.kiln.start_again().await?;
    let whole = stage.kiln.whole_log(&build.id).await?;
    let over = stage.kiln.until(&build.id, is_over).await?;
    let text = String::from_utf8_lossy(&whole);
    ensure!(over.state() == api::BuildState::Succeeded && over.attempt == 1, "{over:?}\n{text}");
    ensure!(whole.starts_with(&log) && text.contains("kiln: done"), "{text}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_build_outlives_kiln_up_ended_and_started_again() -> Result<()> {
    let mut stage = Stage::set().await?;
    let repository = stage.workshop.repository(&[("Dockerfile", &slow(3))], &["."])?;
    let build = stage.begin(&repository.uri).await?;
    stage.kiln.until(&build.id, |build| build.state() == api::BuildState::Running).await?;
    let ended = stage.kiln.terminate().await?;
    ensure!(ended.success(), "{ended}: {}", stage.kiln.log());
    stage.kiln.start_again().await?;
    let over = stage.kiln.until(&build.id, is_over).await?;
    ensure!(over.state() == api::BuildState::Succeeded && over.attempt == 1, "{over:?}");
    ensure!(String::from_utf8_lossy(&stage.kiln.whole_log(&build.id).await?).contains("after"));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_is_still_known_after_a_restart() -> Result<()> {
    let mut stage = Stage::set().await?;
    let repository = stage.workshop.repository(&[("Dockerfile", DOCKERFILE)], &["."])?;
    let build = stage.begin(&repository.uri).await?;
    let log = stage.kiln.whole_log(&build.id).await?;
    let over = stage.kiln.until(&build.id, is_over).await?;
    stage.kiln.kill().await?;
    stage.kiln.start_again().await?;
    let request = api::BuildStatusRequest { id: build.id.clone() };
    ensure!(stage.kiln.client().await?.build_status(request).await?.into_inner() == over);
    ensure!(stage.kiln.whole_log(&build.id).await? == log);
    Ok(())
}
