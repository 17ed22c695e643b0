//! The engine that the configuration names.

use std::os::unix::fs::DirBuilderExt as _;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context as _;
use async_trait::async_trait;
use kiln_bus::Bus;
use kiln_bus::revocations::RevocationsBucket;
use kiln_domain::engine::{self as domain, EngineError};
use kiln_domain::id::RunId;
use kiln_domain::registries::Registries;
use kiln_domain::run_folder::Settings;
use kiln_engine_local::LocalEngine;
use kiln_engine_ws_manager::{CursorKey, Mark, Revocations, WsManagerEngine};
use kiln_registry::OciRegistry;

use crate::config::{Config, Engine, LocalEngine as LocalEngineConfig};
use crate::roles::host::Host;
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
    settings.layer_cache.clone_from(&local.layer_cache);
    settings.programs = bootstrap_folder();
    settings
}

/// The engine, and what there is to close of it.
pub(crate) enum Opened {
    Local(Arc<LocalEngine>),
    WsManager { engine: Arc<WsManagerEngine>, bus: Bus },
}

impl Opened {
    pub(crate) fn engine(&self) -> Arc<dyn domain::Engine> {
        match self {
            Self::Local(engine) => engine.clone(),
            Self::WsManager { engine, .. } => engine.clone(),
        }
    }

    /// Ends its own tasks; builders run on.
    pub(crate) async fn close(self) {
        match self {
            Self::Local(engine) => engine.close().await,
            Self::WsManager { engine, bus } => {
                engine.close().await;
                bus.close().await;
            }
        }
    }
}

/// Opens it, for the orchestrator or the log-relay; one that is shared by both is opened once.
pub(crate) async fn open(config: &Config, host: &Host) -> anyhow::Result<Opened> {
    let registries = config.registries(&config.orchestrator.clone().unwrap_or_default().plain_http);
    match &config.engine {
        Engine::Local(local) => Ok(Opened::Local(open_local(local, registries)?)),
        Engine::WsManager(ws_manager) => {
            let bus = host.connect(config, "engine").await?;
            let revocations = Arc::new(Revoked(RevocationsBucket::open(&bus).await?));
            let registry =
                Arc::new(OciRegistry::new(kiln_registry::Config { registries, ..Default::default() }));
            let key = CursorKey::new(config.open_key()?.derive("ws-manager cursors")?);
            let engine = WsManagerEngine::start(ws_manager.clone(), revocations, registry, key)
                .context("`engine.ws_manager`")?;
            Ok(Opened::WsManager { engine: Arc::new(engine), bus })
        }
    }
}

/// The engine's memory of what must not be started, on the bus.
struct Revoked(RevocationsBucket);

const REVOKED: &str = "revoked";
const REMOVED: &str = "removed";

#[async_trait]
impl Revocations for Revoked {
    async fn get(&self, run: &RunId) -> Result<Option<Mark>, EngineError> {
        let word = self.0.get(run).await.map_err(|error| EngineError::Unavailable(error.to_string()))?;
        Ok(word.map(|word| if word == REMOVED { Mark::Removed } else { Mark::Revoked }))
    }

    async fn put(&self, run: &RunId, mark: Mark) -> Result<(), EngineError> {
        let word = match mark {
            Mark::Revoked => REVOKED,
            Mark::Removed => REMOVED,
        };
        self.0.put(run, word).await.map_err(|error| EngineError::Unavailable(error.to_string()))
    }
}

/// The engine of this host.
pub(crate) fn open_local(
    local: &LocalEngineConfig,
    registries: Registries,
) -> anyhow::Result<Arc<LocalEngine>> {
    let make = |name: &str| {
        let path = local.folder.join(name);
        let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&path);
        made.with_context(|| format!("`engine.local.folder`: can't make {}", path.display())).map(|()| path)
    };
    let program = std::env::current_exe().context("can't find this program's own file")?;
    let layers = make(LAYERS)?;
    let mut config = kiln_engine_local::Config::new(make(RUNS)?, program, layers.clone());
    config.settings = settings(local, layers);
    config.settings.registries = registries;
    match kiln_builder::choose(&config.settings) {
        Ok(tool) => {
            tracing::info!("Dockerfiles are executed by {}", tool.name());
            config.build_tool = Some(tool.name().to_owned());
        }
        Err(problem) => tracing::error!("no Dockerfile can be executed: {problem}"),
    }
    let engine = LocalEngine::new(config);
    engine.sweep();
    Ok(Arc::new(engine))
}
