//! The Docker config file of an installation, as it is now.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use kiln_registry::{Credential, Error};
use moka::future::Cache;
use tokio::io::AsyncReadExt as _;
use tokio::sync::Mutex;
use tokio::time::Instant;

use crate::docker_config::DockerConfig;
use crate::helper::{HelperName, Helpers};
use crate::metrics::Metrics;
use crate::source::{Source, cannot_be_had};

/// The file is looked at so often, at most: it costs one stat.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How long a helper's answer is given again: they keep their own tokens, but cost a process.
const HELPED_FOR: Duration = Duration::from_secs(60);
const FILE_BYTES: u64 = 4 << 20;

/// Its logins, and those of the helpers that it names.
pub(crate) struct ConfigFile {
    path: PathBuf,
    helpers: Helpers,
    current: Mutex<Current>,
    helped: Cache<(HelperName, String), Option<Credential>>,
    metrics: Metrics,
}

struct Current {
    config: Arc<DockerConfig>,
    /// What the file looked like when it was last tried to read; `None` where it was not there.
    stamp: Option<Stamp>,
    looked_at: Instant,
}

/// Of the file behind all symlinks: Kubernetes renews a mounted secret by pointing one elsewhere.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl ConfigFile {
    /// Reads the file. An error names it, and what is wrong.
    pub(crate) async fn open(path: PathBuf, helpers: Helpers, metrics: Metrics) -> Result<Self, String> {
        let stamp = stamp(&path).await;
        let config = Arc::new(read(&path).await.map_err(|flaw| format!("{}: {flaw}", path.display()))?);
        let current = Mutex::new(Current { config, stamp, looked_at: Instant::now() });
        let helped = Cache::builder().max_capacity(1_000).time_to_live(HELPED_FOR).build();
        Ok(Self { path, helpers, current, helped, metrics })
    }

    async fn current(&self) -> Arc<DockerConfig> {
        let mut current = self.current.lock().await;
        if current.looked_at.elapsed() < LOOK_EVERY {
            return current.config.clone();
        }
        current.looked_at = Instant::now();
        // Before it is read: what changes meanwhile is seen at the next look.
        let stamp = stamp(&self.path).await;
        if stamp == current.stamp {
            return current.config.clone();
        }
        current.stamp = stamp;
        let path = self.path.display();
        match read(&self.path).await {
            Ok(config) => {
                current.config = Arc::new(config);
                self.helped.invalidate_all();
                self.metrics.file_read();
                tracing::info!("registry credentials are read anew from {path}");
            }
            // Once for each state of the file, as its stamp is kept.
            Err(flaw) => {
                self.metrics.file_broken();
                tracing::error!(
                    "registry credentials stay as they were, as the file is wrong: {path}: {flaw}"
                );
            }
        }
        current.config.clone()
    }

    async fn ask(&self, helper: &HelperName, registry: &str) -> Result<Option<Credential>, Error> {
        let key = (helper.clone(), registry.to_owned());
        let answer = self.helped.try_get_with(key, self.helpers.get(helper, registry)).await;
        answer.map_err(|problem| {
            self.metrics.source_failed("helper");
            cannot_be_had(registry, problem.as_str())
        })
    }
}

#[async_trait]
impl Source for ConfigFile {
    async fn serves(&self, registry: &str) -> bool {
        let config = self.current().await;
        config.login(registry).is_some() || config.helper(registry).is_some()
    }

    async fn credential(&self, registry: &str) -> Result<Option<Credential>, Error> {
        let config = self.current().await;
        if let Some(helper) = config.helper(registry)
            && let Some(found) = self.ask(helper, registry).await?
        {
            return Ok(Some(found));
        }
        Ok(config.login(registry).cloned())
    }

    async fn registries(&self) -> Vec<String> {
        self.current().await.registries().cloned().collect()
    }
}

async fn stamp(path: &Path) -> Option<Stamp> {
    let metadata = tokio::fs::metadata(path).await.ok()?;
    Some(Stamp {
        device: metadata.dev(),
        inode: metadata.ino(),
        size: metadata.size(),
        modified: (metadata.mtime(), metadata.mtime_nsec()),
        changed: (metadata.ctime(), metadata.ctime_nsec()),
    })
}

async fn read(path: &Path) -> Result<DockerConfig, String> {
    let file = tokio::fs::File::open(path).await.map_err(|error| error.to_string())?;
    let mut bytes = Vec::new();
    file.take(FILE_BYTES + 1).read_to_end(&mut bytes).await.map_err(|error| error.to_string())?;
    if bytes.len() as u64 > FILE_BYTES {
        return Err("it is larger than 4 MiB".into());
    }
    DockerConfig::parse(&bytes).map_err(|flaw| flaw.to_string())
}
