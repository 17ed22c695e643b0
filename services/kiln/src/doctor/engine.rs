//! The engine on this host: what builders need, and what they left.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use kiln_domain::engine::{Engine as _, Handle, Observed};
use kiln_domain::finding::Finding;
use kiln_domain::run_folder::Settings;
use kiln_engine_local::LocalEngine;
use kiln_engine_local::inspect::{self, Found, Stands, room};

use crate::config::{Config, LocalEngine as LocalConfig};
use crate::roles::engine;

/// For the end of what lives of a run, and for its removal.
const ENDING: Duration = Duration::from_secs(60);

const ON_ITS_HOST: &str = "run this on the engine's host, as the user of its orchestrator; the folder is made when that first starts";

fn runs(local: &LocalConfig) -> PathBuf {
    local.folder.join(engine::RUNS)
}

/// Whether the builders of `host` are those of this configuration's folder, here.
pub(super) fn is_on(config: &Config, host: &str) -> bool {
    let here = config.engine.local().map(|local| kiln_engine_local::known_host(&runs(local)));
    here.is_some_and(|here| here.is_ok_and(|here| here == host))
}

fn settings(local: &LocalConfig) -> Settings {
    engine::settings(local, local.folder.join(engine::LAYERS))
}

/// The runs that are there, or why they can't be seen.
pub(super) fn look(config: &Config) -> Result<Vec<Found>, Finding> {
    let Some(local) = config.engine.local() else { return Ok(Vec::new()) };
    let runs = runs(local);
    inspect::look(&runs).map_err(|error| {
        Finding::unchecked("runs", format!("{} can't be read: {error}", runs.display()), ON_ITS_HOST)
    })
}

/// Whether the programs of builders are there and work.
pub(super) async fn tools(config: &Config) -> Vec<Finding> {
    match config.engine.local() {
        Some(local) => kiln_builder::inspect::tools(&settings(local)).await,
        None => vec![Finding::unchecked(
            "engine",
            "builders are workspaces of a ws-manager, which are not examined here".to_owned(),
            "ask ws-manager for the workspaces with the annotation managed-by=image-builder",
        )],
    }
}

/// How full the disks are.
pub(super) fn rooms(config: &Config) -> Vec<Finding> {
    config.engine.local().map(|local| room("disk", existing(&local.folder))).into_iter().collect()
}

/// The folder, or the nearest above it that is there.
fn existing(folder: &Path) -> &Path {
    folder.ancestors().find(|folder| folder.exists()).unwrap_or(folder)
}

/// What is left of runs, here and in the build tool's storage.
pub(super) fn leftovers(
    config: &Config,
    found: Result<Vec<Found>, Finding>,
    stands: impl Fn(&Found) -> Stands,
) -> Vec<Finding> {
    let found = match found {
        Ok(found) => found,
        Err(unseen) => return vec![unseen],
    };
    let mut findings = inspect::findings(&found, &stands);
    // Of a run without a folder nothing is in hand.
    let in_hand = |name: &str| {
        let found = found.iter().find(|found| found.run.as_str() == name);
        found.is_some_and(|found| {
            !found.is_marker() && matches!(stands(found), Stands::InHand | Stands::NotAsked)
        })
    };
    let live = found.iter().any(|found| found.lives);
    if let Some(local) = config.engine.local() {
        findings.extend(kiln_builder::inspect::leftovers(&runs(local), &settings(local), in_hand, live));
    }
    findings
}

/// Removes what is left of runs whose builds are over or unknown, as an orchestrator would. Of an unknown build nothing
/// that lives is ended: it may belong to an installation whose bus this isn't.
pub(super) async fn fix(config: &Config, found: &[Found], stands: impl Fn(&Found) -> Stands) -> Vec<Finding> {
    const PART: &str = "fix";
    let left = found.iter().filter(|found| {
        let stands = stands(found);
        found.is_leftover(stands) && (stands != Stands::Unknown || !found.lives)
    });
    let left: Vec<&Found> = left.collect();
    let Some(local) = config.engine.local() else { return Vec::new() };
    let engine = match engine::open_local(local, Default::default()) {
        Ok(engine) => engine,
        Err(error) => return vec![Finding::unchecked(PART, format!("{error:#}"), ON_ITS_HOST)],
    };
    let mut findings = Vec::new();
    for found in left {
        let removed = tokio::time::timeout(ENDING * 2, remove(&engine, found)).await;
        findings.push(match removed.unwrap_or_else(|_| Err(anyhow::anyhow!("it takes too long"))) {
            Ok(()) => Finding::ok(PART, format!("what was left of run `{}` is removed", found.run)),
            Err(error) => Finding::warning(
                PART,
                format!("run `{}` can't be removed: {error:#}", found.run),
                "see what is said of its processes, containers and mounts",
            ),
        });
    }
    engine.close().await;
    findings
}

async fn remove(engine: &LocalEngine, found: &Found) -> anyhow::Result<()> {
    engine.revoke(&found.run).await?;
    if matches!(engine.observe(&found.run).await?, Observed::Running(_)) {
        engine.cancel(&found.run).await?;
        let handle = Handle::new(found.run.as_str());
        let ended = engine.ended(&found.run, &handle);
        tokio::time::timeout(ENDING, ended).await.context("its processes don't end")??;
    }
    Ok(engine.remove(&found.run).await?)
}
