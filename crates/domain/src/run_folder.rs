//! A run's folder: what its files are called and what stands in them. An engine writes what the builder is to do,
//! the builder answers; neither depends on the other, so their common vocabulary is here.
//!
//! Who writes what: the engine [`SPEC`], [`SECRETS`], [`SETTINGS`], [`CANCEL`] and [`REVOKED`]; the builder [`OUTCOME`],
//! [`TARGET_DIGEST`] and what is in [`WORK`]; [`OUTPUT`] is the builder's standard output and error.

use std::collections::BTreeMap;
use std::path::PathBuf;

use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};

use crate::layer_cache::LayerCache;
use crate::registries::Registries;
use crate::run::RunSecrets;

/// A [`crate::run::RunSpec`], JSON.
pub const SPEC: &str = "spec.json";
/// A [`SecretsFile`], JSON, readable by its owner only.
pub const SECRETS: &str = "secrets.json";
/// A [`Settings`], JSON.
pub const SETTINGS: &str = "settings.json";
/// Held (`flock`, exclusive) by the builder and every process that it started: free means that nothing of the run lives.
/// Whoever only looks takes it shared, so that one who looks is never taken for a builder.
pub const LOCK: &str = "lock";
/// Held (`flock`, exclusive) by the builder's own process alone: free while [`LOCK`] is held means that a builder died and
/// left children behind.
pub const BUILDER_LOCK: &str = "builder.lock";
/// Held (`flock`, exclusive) by the builder from its last look for [`REVOKED`] to the end of that attempt to PUT the target, so that
/// whoever wrote [`REVOKED`] and then had this lock knows: what was to be PUT has been, and nothing will be.
pub const PUSH_LOCK: &str = "push.lock";
/// The builder's standard output and error. It is there from just before the builder is started.
pub const OUTPUT: &str = "output";
/// A [`crate::run::Outcome`], JSON; it appears whole or not at all. There is none of a run that was revoked, or whose
/// builder was killed or told to end by a signal, before the target was PUT: such a run is lost, and says nothing of the build.
pub const OUTCOME: &str = "outcome.json";
/// The digest that the builder is about to PUT at the target; it appears whole or not at all.
pub const TARGET_DIGEST: &str = "target-digest";
/// No builder of the run may begin or go on. Stays when the rest is removed.
pub const REVOKED: &str = "revoked";
/// The builder is asked to end.
pub const CANCEL: &str = "cancel";
/// The builder's own folder: checkout, credentials of its tools, temporary files.
pub const WORK: &str = "work";

/// What executes Dockerfiles.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Builder {
    /// BuildKit where it is found, else buildah.
    #[default]
    Auto,
    Buildkit,
    Buildah,
}

/// How BuildKit is used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Buildkit {
    /// Daemons (`tcp://HOST:PORT` or `unix:///PATH`) of which each build uses one. None: Kiln's own, on this host.
    pub addresses: Vec<String>,
    /// How daemons at a `tcp://` address are spoken to.
    pub tls: Option<BuildkitTls>,
    /// What a `# syntax=` line may name besides `docker/dockerfile`, which is built in.
    pub frontends: Vec<String>,
    /// How large the own daemon's cache may grow.
    pub cache_bytes: u64,
    /// How long the own daemon lives on without a build.
    pub idle_seconds: u64,
    /// Registry hosts (`host[:port]`) that the own daemon speaks to in plain HTTP; loopback is, without being named.
    pub plain_http: Vec<String>,
}

/// PEM files for mutual TLS.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BuildkitTls {
    /// Of who signed the daemons' certificates.
    pub ca: PathBuf,
    pub cert: PathBuf,
    pub key: PathBuf,
    /// The name in the daemons' certificates, where it isn't their host's.
    #[serde(default)]
    pub server_name: Option<String>,
}

impl Default for Buildkit {
    fn default() -> Self {
        Self {
            addresses: Vec::new(),
            tls: None,
            frontends: Vec::new(),
            cache_bytes: 20_000_000_000,
            idle_seconds: 600,
            plain_http: Vec::new(),
        }
    }
}

/// What the installation says of its builders; the same for each run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    #[serde(default)]
    pub builder: Builder,
    #[serde(default)]
    pub buildkit: Buildkit,
    #[serde(default)]
    pub layer_cache: LayerCache,
    /// How registries are reached.
    #[serde(default)]
    pub registries: Registries,
    /// A folder of programs besides those on the PATH.
    #[serde(default)]
    pub programs: Option<PathBuf>,
    /// The folder in which the build tool keeps layers, common to all runs.
    pub storage: PathBuf,
    /// How the build tool stacks layers: `overlay` (root or a recent kernel), or `vfs` (everywhere, slower).
    #[serde(default = "overlay")]
    pub storage_driver: String,
    /// How steps are kept apart from the host: `chroot`, `rootless` or `oci`.
    #[serde(default = "chroot")]
    pub isolation: String,
}

impl Settings {
    /// The defaults, with layers kept in `storage`.
    pub fn new(storage: PathBuf) -> Self {
        Self {
            builder: Builder::default(),
            buildkit: Buildkit::default(),
            layer_cache: LayerCache::default(),
            registries: Registries::default(),
            programs: None,
            storage,
            storage_driver: overlay(),
            isolation: chroot(),
        }
    }
}

fn overlay() -> String {
    "overlay".into()
}

fn chroot() -> String {
    "chroot".into()
}

/// [`RunSecrets`] as they stand in [`SECRETS`]. It has no `Debug`, so that it can't get into a log.
#[derive(Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SecretsFile {
    #[serde(default)]
    git_username: String,
    #[serde(default)]
    git_password: Option<String>,
    #[serde(default)]
    registries: BTreeMap<String, String>,
    #[serde(default)]
    push: BTreeMap<String, String>,
    #[serde(default)]
    mounts: BTreeMap<String, String>,
}

impl From<&RunSecrets> for SecretsFile {
    fn from(secrets: &RunSecrets) -> Self {
        let exposed = |map: &BTreeMap<String, SecretString>| {
            map.iter().map(|(name, value)| (name.clone(), value.expose_secret().to_owned())).collect()
        };
        Self {
            git_username: secrets.git_username.clone(),
            git_password: secrets.git_password.as_ref().map(|password| password.expose_secret().to_owned()),
            registries: exposed(&secrets.registries),
            push: exposed(&secrets.push),
            mounts: exposed(&secrets.mounts),
        }
    }
}

impl From<SecretsFile> for RunSecrets {
    fn from(file: SecretsFile) -> Self {
        let hidden = |map: BTreeMap<String, String>| {
            map.into_iter().map(|(name, value)| (name, value.into())).collect()
        };
        Self {
            git_username: file.git_username,
            git_password: file.git_password.map(SecretString::from),
            registries: hidden(file.registries),
            push: hidden(file.push),
            workspace: None,
            mounts: hidden(file.mounts),
        }
    }
}
