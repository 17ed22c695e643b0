//! The configuration of a Kiln process: one file for all roles, of which each reads its own section and what is
//! common. `kiln up` takes the same file and fills in what it starts itself.

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use kiln_bus::layout::Layout;
use kiln_bus::seal::{OpenKey, SealKey};
use kiln_bus::{Connect, Lease};
use kiln_chassis::config::{self, Environment, Problem};
use kiln_chassis::telemetry;
use kiln_domain::layer_cache::LayerCache;
use kiln_domain::reference::ImageReference;
use kiln_domain::registries::Registries;
use kiln_domain::run_folder::{Builder, Buildkit};
use secrecy::{ExposeSecret as _, SecretString};
use serde::{Deserialize, Serialize};

use crate::mk3_config;

/// Variables that begin as configuration does and mean something else.
const RESERVED: [&str; 9] = [
    telemetry::FILTER_VARIABLE,
    telemetry::FORMAT_VARIABLE,
    "KILN_ADDR",
    "KILN_CONFIG",
    "KILN_GIT_PASSWORD",
    "KILN_GIT_USERNAME",
    "KILN_NATS_SERVER",
    "KILN_NATS_URL",
    "KILN_REGISTRY",
];

/// Where the gRPC API listens, unless something else is said.
pub(crate) const DEFAULT_GRPC: SocketAddr = SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::LOCALHOST, 8080));

/// The parts that may be a process of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Role {
    Gateway,
    Resolver,
    Orchestrator,
    LogRelay,
    CacheWarmer,
}

impl Role {
    pub(crate) const ALL: [Self; 5] =
        [Self::Gateway, Self::Resolver, Self::Orchestrator, Self::LogRelay, Self::CacheWarmer];
}

/// The whole file. Written again (`kiln up` does, for the doctor), it lacks the secrets that it holds itself.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Config {
    pub(crate) nats: Nats,
    pub(crate) seal: Seal,
    pub(crate) streams: Streams,
    pub(crate) holders: Holders,
    pub(crate) listen: Listen,
    pub(crate) engine: Engine,
    /// How registries are reached: of all that speak to one, builders on this host included.
    pub(crate) registries: Registries,
    /// Of the resolver and the orchestrator.
    pub(crate) credentials: kiln_credentials::Config,
    pub(crate) gateway: Option<kiln_gateway::Config>,
    pub(crate) resolver: Option<kiln_resolver::Config>,
    pub(crate) orchestrator: Option<kiln_orchestrator::Config>,
    pub(crate) log_relay: Option<kiln_log_relay::Config>,
    pub(crate) cache_warmer: Option<kiln_cache_warmer::Config>,
}

/// A configuration, and what its file was.
#[derive(Debug)]
pub(crate) struct Loaded {
    pub(crate) config: Config,
    /// Whether the file is that of an image-builder-mk3.
    pub(crate) is_mk3s: bool,
    /// Where that one listened.
    pub(crate) mk3_grpc: Option<SocketAddr>,
    /// A line for each of its keys that has no meaning here.
    pub(crate) ignored: Vec<String>,
}

impl Loaded {
    /// Reads the file, ours or mk3's, and `KILN_…` over it, and checks no more than keys and types.
    pub(crate) fn read(file: Option<&Path>) -> anyhow::Result<Self> {
        Self::of(file, |_| Vec::new())
    }

    /// The same, and checks what is common, the sections that are there, and those of `roles` in any case.
    pub(crate) fn checked(file: Option<&Path>, roles: &[Role]) -> anyhow::Result<Self> {
        Self::of(file, |config| config.problems(roles))
    }

    fn of(file: Option<&Path>, check: impl FnOnce(&Config) -> Vec<Problem>) -> anyhow::Result<Self> {
        let environment = Environment::of_process(&RESERVED);
        let mk3s = match file {
            Some(path) => Some((path, config::read(path)?)).filter(|(_, keys)| mk3_config::is_mk3s(keys)),
            None => None,
        };
        let Some((path, keys)) = mk3s else {
            let config = config::load(file, &environment, check)?;
            return Ok(Self { config, is_mk3s: false, mk3_grpc: None, ignored: Vec::new() });
        };
        let of_file = || format!("the configuration file {}", path.display());
        let mut mk3 = mk3_config::translate(keys).with_context(of_file)?;
        let loaded = config::load_translated(std::mem::take(&mut mk3.keys), path, &environment, check);
        let (config, unknown) = loaded.map_err(|error| error.renamed(|key| mk3.name_of(key)))?;
        let unknown = unknown.iter().map(|key| format!("`{key}` is not known here and has no effect"));
        let ignored = mk3.ignored.into_iter().chain(unknown).collect();
        Ok(Self { config, is_mk3s: true, mk3_grpc: mk3.grpc, ignored })
    }

    /// The configuration; what of the file has no meaning here is logged.
    pub(crate) fn noted(self) -> Config {
        for line in &self.ignored {
            tracing::warn!("the configuration file is an image-builder-mk3's: {line}");
        }
        self.config
    }
}

/// Where the bus is, and who we are to it.
#[derive(Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Nats {
    /// `nats://host:port`, or several with commas between; without credentials.
    pub(crate) url: String,
    pub(crate) user: Option<String>,
    #[serde(skip_serializing)]
    pub(crate) password: Option<SecretString>,
    /// A file that holds the password.
    pub(crate) password_file: Option<PathBuf>,
}

/// The key pair that secrets are sealed with: `seed` or `seed_file` for who opens them, `public_key` for a gateway.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Seal {
    #[serde(skip_serializing)]
    pub(crate) seed: Option<SecretString>,
    pub(crate) seed_file: Option<PathBuf>,
    pub(crate) public_key: Option<String>,
}

/// The sizes of the streams; the same in every process of an installation.
#[derive(Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Streams {
    /// 1 on one node, 3 on a cluster.
    pub(crate) replicas: usize,
    pub(crate) journal_max_bytes: i64,
    pub(crate) logs_max_bytes: i64,
    pub(crate) logs_max_age_hours: u64,
}

/// The leases of orchestrators and log-relays; the same in every process of an installation.
#[derive(Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Holders {
    /// What a dead one held goes on when its lease has lapsed.
    pub(crate) lease_seconds: u64,
}

/// Where the process listens. `grpc` is the gateway's.
#[derive(Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Listen {
    pub(crate) grpc: SocketAddr,
    pub(crate) health: SocketAddr,
    pub(crate) metrics: SocketAddr,
}

/// What runs builders: of the orchestrator, and of the log-relay that reads their output.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Engine {
    Local(LocalEngine),
    /// Builders as workspaces of Gitpod's ws-manager.
    WsManager(kiln_engine_ws_manager::Config),
}

impl Engine {
    /// The engine of this host, if it is that.
    pub(crate) fn local(&self) -> Option<&LocalEngine> {
        match self {
            Self::Local(local) => Some(local),
            Self::WsManager(_) => None,
        }
    }
}

/// Builders as processes of this host.
#[derive(Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct LocalEngine {
    /// Holds a folder for each run, and the layers that the build tool keeps.
    pub(crate) folder: PathBuf,
    /// `overlay`, or `vfs`: works everywhere, slower.
    pub(crate) storage_driver: Option<String>,
    /// `chroot`, `rootless` or `oci`.
    pub(crate) isolation: Option<String>,
    /// `auto`, `buildkit` or `buildah`.
    pub(crate) builder: Builder,
    pub(crate) buildkit: Buildkit,
    /// The layers of builds in a registry.
    pub(crate) layer_cache: LayerCache,
}

impl Default for Nats {
    fn default() -> Self {
        Self { url: "nats://127.0.0.1:4222".into(), user: None, password: None, password_file: None }
    }
}

impl Default for Streams {
    fn default() -> Self {
        let Layout { replicas, journal_max_bytes, logs_max_bytes, logs_max_age } = Layout::default();
        Self {
            replicas,
            journal_max_bytes,
            logs_max_bytes,
            logs_max_age_hours: logs_max_age.as_secs() / 3600,
        }
    }
}

impl Default for Holders {
    fn default() -> Self {
        Self { lease_seconds: 30 }
    }
}

impl Default for Listen {
    fn default() -> Self {
        let local = |port| SocketAddr::from(([127, 0, 0, 1], port));
        Self { grpc: DEFAULT_GRPC, health: local(9501), metrics: local(9500) }
    }
}

impl Default for Engine {
    fn default() -> Self {
        Self::Local(LocalEngine::default())
    }
}

impl Default for LocalEngine {
    fn default() -> Self {
        Self {
            folder: "/var/lib/kiln".into(),
            storage_driver: None,
            isolation: None,
            builder: Builder::default(),
            buildkit: Buildkit::default(),
            layer_cache: LayerCache::default(),
        }
    }
}

impl Config {
    /// What is wrong, each by its key.
    pub(crate) fn problems(&self, roles: &[Role]) -> Vec<Problem> {
        let mut problems = self.common_problems();
        let mut section = |name: &str, found: Vec<String>| {
            problems.extend(found.iter().map(|text| in_section(name, text)));
        };
        section("credentials", self.credentials.problems());
        section("registries", self.registries.problems());
        if let Some(local) = self.engine.local() {
            section("engine.local.layer_cache", local.layer_cache.problems());
        }
        let needs = |role| roles.contains(&role);
        if let Some(gateway) = &self.gateway {
            section("gateway", gateway.problems());
        }
        if self.resolver.is_some() || needs(Role::Resolver) {
            section("resolver", self.resolver.clone().unwrap_or_default().problems());
        }
        if self.orchestrator.is_some() || needs(Role::Orchestrator) {
            section("orchestrator", self.orchestrator.clone().unwrap_or_default().problems());
        }
        if self.log_relay.is_some() || needs(Role::LogRelay) {
            section("log_relay", self.log_relay.clone().unwrap_or_default().problems());
        }
        if self.cache_warmer.is_some() || needs(Role::CacheWarmer) {
            let warmer = self.cache_warmer.clone().unwrap_or_default();
            section("cache_warmer", warmer.problems());
            if warmer.pull_bytes > 0 && self.engine.local().is_none() {
                section(
                    "cache_warmer",
                    vec!["pull_bytes: is for the local engine, whose builds have a store here".into()],
                );
            }
        }
        problems
    }

    fn common_problems(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        let mut wrong = |found: bool, key: &str, message: &str| {
            if found {
                problems.push(Problem::new(key, message));
            }
        };
        wrong(self.nats.url.is_empty(), "nats.url", "is empty");
        wrong(
            self.nats.url.contains('@'),
            "nats.url",
            "must not hold credentials: they are `nats.user` and `nats.password`",
        );
        wrong(
            self.nats.password.is_some() && self.nats.password_file.is_some(),
            "nats.password_file",
            "stands beside `nats.password`: one of them",
        );
        let password = self.nats.password.is_some() || self.nats.password_file.is_some();
        wrong(password != self.nats.user.is_some(), "nats.user", "user and password go together");
        wrong(
            self.seal.seed.is_some() && self.seal.seed_file.is_some(),
            "seal.seed_file",
            "stands beside `seal.seed`: one of them",
        );
        wrong(![1, 3, 5].contains(&self.streams.replicas), "streams.replicas", "must be 1, 3 or 5");
        let known = |server: &str| {
            ["nats://", "tls://"]
                .iter()
                .any(|scheme| server.trim().strip_prefix(scheme).is_some_and(|rest| !rest.is_empty()))
        };
        wrong(
            !self.nats.url.is_empty() && !self.nats.url.split(',').all(known),
            "nats.url",
            "must be nats://HOST:PORT or tls://HOST:PORT, or several of them with commas between",
        );
        let seed = self.seal.seed.clone();
        wrong(seed.is_some_and(|seed| OpenKey::from_seed(seed).is_err()), "seal.seed", "is no xkey's seed");
        let public = self.seal.public_key.as_deref();
        wrong(
            public.is_some_and(|key| SealKey::from_public(key).is_err()),
            "seal.public_key",
            "is no xkey's public key",
        );
        for (key, bytes) in [
            ("streams.journal_max_bytes", self.streams.journal_max_bytes),
            ("streams.logs_max_bytes", self.streams.logs_max_bytes),
        ] {
            wrong(bytes < 1 << 20, key, "must be at least 1 MiB");
        }
        wrong(self.streams.logs_max_age_hours == 0, "streams.logs_max_age_hours", "must be at least 1");
        wrong(
            !Lease::SECONDS.contains(&self.holders.lease_seconds),
            "holders.lease_seconds",
            "must be between 3 and 30",
        );
        match &self.engine {
            Engine::Local(local) => {
                wrong(!local.folder.is_absolute(), "engine.local.folder", "must be an absolute path");
                problems_of_buildkit(&local.buildkit, &mut wrong);
            }
            Engine::WsManager(ws_manager) => {
                wrong(ws_manager.builder_image.is_empty(), "engine.ws_manager.builder_image", "is empty");
            }
        }
        problems
    }

    /// The gateway's settings, with the registries of our own repositories where none are named.
    pub(crate) fn gateway(&self) -> kiln_gateway::Config {
        let mut gateway = self.gateway.clone().unwrap_or_default();
        let Some(orchestrator) = &self.orchestrator else { return gateway };
        for (registry, repository) in [
            (&mut gateway.base_registry, &orchestrator.base_image_repository),
            (&mut gateway.workspace_registry, &orchestrator.workspace_image_repository),
        ] {
            // What can't be parsed, the orchestrator refuses.
            if let (true, Ok(reference)) = (registry.is_empty(), repository.parse::<ImageReference>()) {
                reference.registry().clone_into(registry);
            }
        }
        gateway
    }

    /// How registries are reached, with those of a role's own list in plain HTTP.
    pub(crate) fn registries(&self, plain_http: &[String]) -> Registries {
        let mut registries = self.registries.clone();
        registries.plain(plain_http.iter().cloned());
        registries
    }

    /// How a role connects to the bus.
    pub(crate) fn connect(&self, role: &str) -> anyhow::Result<Connect> {
        let password = secret(&self.nats.password, &self.nats.password_file, "nats.password_file")?;
        Ok(Connect {
            url: self.nats.url.clone(),
            user: self.nats.user.clone(),
            password,
            name: format!("kiln-{role}"),
        })
    }

    /// The streams and buckets as this installation wants them.
    pub(crate) fn layout(&self) -> Layout {
        Layout {
            replicas: self.streams.replicas,
            journal_max_bytes: self.streams.journal_max_bytes,
            logs_max_bytes: self.streams.logs_max_bytes,
            logs_max_age: Duration::from_secs(self.streams.logs_max_age_hours.saturating_mul(3600)),
        }
    }

    /// How long leases last.
    pub(crate) fn lease(&self) -> Lease {
        Lease::of_seconds(self.holders.lease_seconds)
    }

    /// The key pair of who opens secrets.
    pub(crate) fn open_key(&self) -> anyhow::Result<OpenKey> {
        let seed = secret(&self.seal.seed, &self.seal.seed_file, "seal.seed_file")?
            .context("`seal.seed` or `seal.seed_file` is missing: this role opens secrets")?;
        OpenKey::from_seed(seed).context("`seal.seed`")
    }

    /// The public key of who only seals them: given, or the key pair's.
    pub(crate) fn seal_key(&self) -> anyhow::Result<SealKey> {
        match &self.seal.public_key {
            Some(public) => SealKey::from_public(public).context("`seal.public_key`"),
            None => Ok(self.open_key().context("`seal.public_key` is missing")?.seal_key()),
        }
    }
}

fn secret(
    value: &Option<SecretString>,
    file: &Option<PathBuf>,
    key: &str,
) -> anyhow::Result<Option<SecretString>> {
    let Some(path) = file else { return Ok(value.clone()) };
    let text: SecretString = std::fs::read_to_string(path)
        .with_context(|| format!("`{key}`: {} can't be read", path.display()))?
        .into();
    Ok(Some(text.expose_secret().trim().to_owned().into()))
}

/// A service names its problems `key: what`.
fn in_section(section: &str, text: &str) -> Problem {
    match text.split_once(": ") {
        Some((key, message)) => Problem::new(format!("{section}.{key}"), message),
        None => Problem::new(section, text),
    }
}
/// What is wrong with the settings of BuildKit: `wrong(whether, key, what)`.
fn problems_of_buildkit(buildkit: &Buildkit, wrong: &mut impl FnMut(bool, &str, &str)) {
    let addressed =
        |scheme: &str, address: &String| address.strip_prefix(scheme).is_some_and(|rest| !rest.is_empty());
    let known = |address: &String| addressed("tcp://", address) || addressed("unix:///", address);
    wrong(
        !buildkit.addresses.iter().all(known),
        "engine.local.buildkit.addresses",
        "each must be tcp://HOST:PORT or unix:///PATH",
    );
    wrong(
        buildkit.tls.is_none() && buildkit.addresses.iter().any(|address| addressed("tcp://", address)),
        "engine.local.buildkit.tls",
        "is missing: a daemon at a tcp:// address gets the credentials of builds",
    );
    wrong(buildkit.cache_bytes < 100 << 20, "engine.local.buildkit.cache_bytes", "must be at least 100 MiB");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_written_without_its_secrets_and_read_again() {
        let text = r#"{
            "nats": {"user": "kiln", "password": "hunter2"},
            "seal": {"seed": "hunter3"},
            "engine": {"ws_manager": {"address": "ws-manager:8080", "builder_image": "bob"}},
            "orchestrator": {"slots": 7}
        }"#;
        let config: Config = serde_json::from_str(text).unwrap();
        let written = serde_json::to_string(&config).unwrap();
        assert!(!written.contains("hunter"), "{written}");
        let again: Config = serde_json::from_str(&written).unwrap();
        assert_eq!(serde_json::to_value(&again).unwrap(), serde_json::to_value(&config).unwrap());
        assert_eq!(again.orchestrator.unwrap().slots, 7);
    }
}
