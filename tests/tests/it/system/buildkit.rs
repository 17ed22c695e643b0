//! The same with BuildKit as the build tool, where that is there.

use anyhow::{Result, ensure};
use kiln_proto::kiln_v1 as api;
use kiln_testkit::workshop::Workshop;

use super::{Stage, begun, dockerfile, is_over};

const DOCKERFILE: &str = "# syntax=docker/dockerfile:1\nFROM scratch\nCOPY busybox /bin/sh\n\
     RUN --mount=type=secret,id=token <<EOF\necho hello from the build\ncat /run/secrets/token\nsleep 2\nEOF\n\
     RUN echo $((6 * 7))\n";
const SECRET: &[u8] = b"first line of it\nanother line";

#[tokio::test(flavor = "multi_thread")]
async fn a_secret_is_used_and_not_shown_and_layers_are_kept() -> Result<()> {
    if Workshop::with_buildkit(kiln_builder::missing).await?.is_none() {
        return Ok(());
    }
    let stage = Stage::set_with(&["--builder=buildkit"]).await?;
    let repository = stage.workshop.repository(&[("Dockerfile", DOCKERFILE)], &["."])?;
    let ask = |force| {
        let request = dockerfile(&repository.uri, |_| {});
        api::BuildImageRequest { force, secrets: [("token".to_owned(), SECRET.to_vec())].into(), ..request }
    };
    let build = begun(stage.ask(ask(false)).await?)?;
    let running = stage
        .kiln
        .until(&build.id, |build| build.state() == api::BuildState::Running || is_over(build))
        .await?;
    ensure!(running.build_tool == "buildkit", "not told while it runs: {running:?}");
    let log = stage.kiln.whole_log(&build.id).await?;
    let text = String::from_utf8_lossy(&log);
    for line in ["[stage-0 1/3] COPY busybox /bin/sh\n", " hello from the build\n", " ***\n", " 42\n"] {
        ensure!(text.contains(line), "{line} is not in {text}");
    }
    ensure!(!text.contains("line of it") && !text.contains("another line"), "the secret shows: {text}");
    let over = stage.kiln.until(&build.id, is_over).await?;
    ensure!(over.state() == api::BuildState::Succeeded && over.build_tool == "buildkit", "{over:?}\n{text}");
    let numbers: Vec<_> = over.steps.iter().map(|step| (step.number, step.of)).collect();
    ensure!(numbers == [(1, 3), (2, 3), (3, 3)], "{:?}", over.steps);

    let again = begun(stage.ask(ask(true)).await?)?;
    let again = stage.kiln.until(&again.id, is_over).await?;
    ensure!(again.steps.len() == 3 && again.steps.iter().all(|step| step.cached), "{again:?}");
    ensure!(again.digest == over.digest);
    Ok(())
}
