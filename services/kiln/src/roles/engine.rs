//! The engine that the configuration names.

use std::os::unix::fs::DirBuilderExt as _;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context as _;
use kiln_domain::run_folder::Settings;
use kiln_engine_local::LocalEngine;

use crate::config::{Config, Engine, LocalEngine as LocalEngineConfig};
use crate::up::bootstrap_folder;

/// Of the engine's folder: a folder for each run.
pub(crate) const RUNS: &str = "runs";
/// Of the engine's folder: what the build tool keeps.
pub(crate) const LAYERS: &str = "layers";

/// What builders are told, with layers kept in `layers`.
pub(crate) fn settings(local: &LocalEngineConfig, layers: PathBuf) -> Settings {
    let mut settings = Settings::new(layers);
    if let Some(driver) = &local.storage_driver {
        settings.storage_driver.clone_from(driver);
    }
    if let Some(isolation) = &local.isolation {
        settings.isolation.clone_from(isolation);
    }
    settings.builder = local.builder;
    settings.buildkit.clone_from(&local.buildkit);
    settings.programs = bootstrap_folder();
    settings
}

/// Opens it, for the orchestrator or the log-relay; one that is shared by both is opened once.
pub(crate) fn open(config: &Config) -> anyhow::Result<Arc<LocalEngine>> {
    let Engine::Local(local) = &config.engine;
    let make = |name: &str| {
        let path = local.folder.join(name);
        let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&path);
        made.with_context(|| format!("`engine.local.folder`: can't make {}", path.display())).map(|()| path)
    };
    let plain_http =
        config.orchestrator.as_ref().map(|orchestrator| orchestrator.plain_http.clone()).unwrap_or_default();
    let program = std::env::current_exe().context("can't find this program's own file")?;
    let layers = make(LAYERS)?;
    let mut config = kiln_engine_local::Config::new(make(RUNS)?, program, layers.clone());
    config.settings = settings(local, layers);
    config.settings.buildkit.plain_http.extend(plain_http);
    match kiln_builder::choose(&config.settings) {
        Ok(tool) => {
            tracing::info!("Dockerfiles are executed by {}", tool.name());
            config.build_tool = Some(tool.name().to_owned());
        }
        Err(problem) => tracing::error!("no Dockerfile can be executed: {problem}"),
    }
    let engine = LocalEngine::new(config);
    if let Err(error) = engine.sweep() {
        tracing::warn!("revocations of runs that are long over stay for now: {error}");
    }
    Ok(Arc::new(engine))
}
