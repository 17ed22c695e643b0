//! Twenty builds in the middle of which ws-manager and supervisors can't be reached, and an orchestrator and a log-relay die.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use async_trait::async_trait;
use futures::future::try_join_all;
use kiln_domain::reference::ImageReference;
use kiln_proto::builder as mk3;
use kiln_testkit::registry::DockerRegistry;
use kiln_testkit::workshop::Workshop;
use kiln_testkit::ws_manager::{Work, Workspace};
use tokio::sync::watch;

use super::{Place, by_id, next};
use crate::system::image_builder::{all, image};

const BUILDS: usize = 20;
const ROLES: [&str; 6] = ["gateway", "resolver", "orchestrator", "orchestrator", "log-relay", "log-relay"];
/// Each build writes so much before, during and after the time without a connection: all of it stays in a supervisor's ring.
const LINES: usize = 1000;

/// How long nobody is reached. DROP_IN_SECONDS makes it another.
#[expect(clippy::disallowed_methods, reason = "how long a test takes is for who runs it to say")]
fn away() -> Result<Duration> {
    match std::env::var("DROP_IN_SECONDS") {
        Ok(text) => Ok(Duration::from_secs(text.parse().context("DROP_IN_SECONDS")?)),
        Err(_) => Ok(Duration::from_secs(10)),
    }
}

/// Work that goes on when the test says so.
struct Played {
    workshop: Arc<Workshop>,
    stage: watch::Receiver<u32>,
}

#[async_trait]
impl Work for Played {
    async fn build(&self, workspace: &Workspace) -> Result<(), String> {
        let mut stage = self.stage.clone();
        for number in 0..3 {
            let reached = stage.wait_for(|reached| *reached >= number).await;
            reached.map_err(|error| error.to_string())?;
            for line in 0..LINES {
                workspace.write(&format!("{number} {line:06} of {}\r\n", workspace.request.id));
            }
        }
        // Every fourth is the user's mistake, told while nobody could hear it.
        let target: ImageReference =
            workspace.annotation("ref").parse().map_err(|error| format!("{error}"))?;
        if workspace.annotation("baseref").contains("broken") {
            return Err("exit status 1".into());
        }
        let name = format!("{}:{}", target.repository(), target.tag().unwrap_or_default());
        let files = [("id", workspace.request.id.as_bytes())];
        let pushed = self.workshop.registry.push_image(&name, "linux/amd64", &files).await;
        pushed.map(|_| ()).map_err(|error| error.to_string())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn twenty_builds_come_out_right_whoever_is_cut_off_or_killed() -> Result<()> {
    let away = away()?;
    let (stage, reached) = watch::channel(0);
    let bases = DockerRegistry::start().await?;
    let mut place =
        Place::set(&ROLES, |workshop| Ok(Arc::new(Played { workshop: workshop.clone(), stage: reached })))
            .await?;
    let mut builds = Vec::new();
    for number in 0..BUILDS {
        let name = if number % 4 == 0 { "broken" } else { "good" };
        let content = number.to_string();
        bases.push_image(&format!("{name}:{number}"), "linux/amd64", &[("n", content.as_bytes())]).await?;
        let source = image(&bases.reference(&format!("{name}:{number}"))?.to_string());
        let request = mk3::BuildRequest { source: Some(source), ..Default::default() };
        let mut stream = place.client().await?.build(request).await?.into_inner();
        next(&mut stream).await?;
        let running = next(&mut stream).await.with_context(|| place.fleet.log())?;
        let info = running.info.context("info")?;
        builds.push((number, stream, info));
    }
    ensure!(place.ws_manager.running().len() == BUILDS);
    place.wire.cut();
    place.supervisors.cut();
    for role in ["orchestrator", "log-relay"] {
        place.fleet.kill(role).await?;
    }
    // They go on, and are over before anybody can ask.
    stage.send(1)?;
    tokio::time::sleep(away / 2).await;
    stage.send(2)?;
    tokio::time::sleep(away / 2).await;
    place.wire.restore();
    place.supervisors.restore();
    let ends = builds.into_iter().map(|(number, stream, info)| async move {
        let rest = all(stream).await?;
        anyhow::Ok((number, rest, info))
    });
    let ends =
        tokio::time::timeout(super::SOON, try_join_all(ends)).await.with_context(|| place.fleet.log())??;
    for (number, rest, info) in ends {
        let [done] = rest.as_slice() else { anyhow::bail!("one message follows: {rest:?}") };
        let log = place.log(by_id(&info.build_id)).await?;
        let url = info.log_info.context("log_info")?.url;
        let run = url.rsplit('/').next().unwrap_or_default();
        let written = place.ws_manager.supervisors.output(run);
        ensure!(written.len() > 3 * LINES * 10, "it did not run");
        ensure!(log == written, "of {} bytes there are {}", written.len(), log.len());
        let expected = match number % 4 {
            0 => (mk3::BuildStatus::DoneFailure, "build failed: headless task failed: exit status 1"),
            _ => (mk3::BuildStatus::DoneSuccess, ""),
        };
        ensure!((done.status(), done.message.as_str()) == expected, "{number}: {done:?}");
    }
    ensure!(place.ws_manager.running().is_empty());
    Ok(())
}
