//! Nothing is left of any build: no secret, file, process, mount or container.

use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use kiln_bus::journal::Journal;
use kiln_bus::secrets::SecretsBucket;
use kiln_domain::run_folder;
use tokio::time::{Instant, sleep};

use super::Problem;
use crate::chaos::faults::builders;
use crate::chaos::world::World;

/// The longest that something is left on purpose: an entry for a build that was never accepted, two minutes; and some
/// more for a loaded machine.
const BOUND: Duration = Duration::from_secs(240);

/// Waits until nothing is left, and tells what is when that takes too long. Entries for builds that were never accepted are
/// waited for only with `patience`.
pub(in crate::chaos) async fn cleaned_up(world: &World, patience: bool) -> Result<Vec<Problem>> {
    let bus = world.bus().await?;
    let (secrets, journal) = (SecretsBucket::open(&bus).await?, Journal::open(&bus).await?);
    let since = Instant::now();
    loop {
        let mut left = left_here(world)?;
        match secrets.builds().await {
            Ok(builds) => {
                for id in builds {
                    if patience || journal.last_of_build(&id).await?.is_some() {
                        left.push(format!("an entry in KILN_SECRETS for {id}"));
                    }
                }
            }
            Err(error) => left.push(format!("KILN_SECRETS can't be read: {error}")),
        }
        if left.is_empty() {
            return Ok(Vec::new());
        }
        if since.elapsed() > BOUND {
            return Ok(left.into_iter().map(|left| Problem::new(format!("left: {left}"))).collect());
        }
        sleep(Duration::from_millis(500)).await;
    }
}

fn left_here(world: &World) -> Result<Vec<String>> {
    let (engine, runs) = (world.engine(), world.runs());
    let mut left: Vec<_> =
        builders(&runs).into_iter().map(|pid| format!("builder {}", pid.as_raw_nonzero())).collect();
    for run in std::fs::read_dir(&runs)? {
        let run = run?.path();
        for file in std::fs::read_dir(&run).into_iter().flatten().flatten() {
            if file.file_name() != run_folder::REVOKED {
                left.push(file.path().display().to_string());
            }
        }
    }
    left.extend(processes_in(&engine));
    // The build tool keeps its storage mounted on itself; containers are mounted below it.
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
    let points = mounts.lines().filter_map(|line| line.split(' ').nth(4));
    let ours = points.filter(|point| Path::new(point).starts_with(&engine));
    left.extend(
        ours.filter(|point| point.ends_with("/merged") || point.starts_with(&*runs.to_string_lossy()))
            .map(|point| format!("mount {point}")),
    );
    let containers = engine.join("layers/buildah/root/overlay-containers");
    for container in std::fs::read_dir(containers).into_iter().flatten().flatten() {
        if container.file_type()?.is_dir() {
            left.push(format!("container {}", container.path().display()));
        }
    }
    Ok(left)
}

/// Processes of steps and tools: those that work in the engine's folder.
fn processes_in(engine: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for process in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let inside = |link: &str| {
            std::fs::read_link(process.path().join(link)).is_ok_and(|path| path.starts_with(engine))
        };
        if inside("cwd") || inside("root") {
            let name = std::fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            found.push(format!("process {} {}", process.file_name().display(), name.trim()));
        }
    }
    found
}
