//! A build's layers into the cache in the registry (`kiln export-layers`), by a process of its own: the build's answer waits
//! for none of it, and whatever becomes of it, the build has succeeded.
//!
//! - **I am asked** by a builder that has pushed an image: it puts what was built from aside, in a folder that is mine alone,
//!   and holds BuildKit's daemon in use until I have ended.
//! - **I tell** by a line of `exports.log`, beside the folders.
//! - **I never** hold the run's lock, nor PUT anything but references of the cache; and I leave no credentials behind.

use std::collections::BTreeMap;
use std::fs::{DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;
use std::time::Duration;

use kiln_domain::layer_cache::CacheRefs;
use kiln_domain::run_folder::Settings;
use kiln_registry::{Access, Config, Keyring, OciRegistry};
use rustix::fs::{FlockOperation, flock};
use secrecy::SecretString;
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep, timeout_at};

use crate::buildkit;
use crate::children::{Children, Show};
use crate::context;
use crate::folder::{removed, write_private};
use crate::leftovers::remove_folder;
use crate::lock::open;
use crate::output::Output;
use crate::secret_files;

/// What an exporter is told: an [`Export`], JSON, as it holds credentials readable by its owner only.
const EXPORT: &str = "export.json";
/// Held (`flock`) by the exporter of a folder.
const OWN_LOCK: &str = "exporter.lock";
/// Beside the folders; held by the one exporter whose turn it is, so that exports take no more than one build's share of a host.
const TURN: &str = "turn.lock";
const LOG: &str = "exports.log";
/// A longer log begins anew.
const LOG_BYTES: u64 = 1 << 20;
const LOOK: Duration = Duration::from_millis(100);
/// A folder that nobody works on for so long was left by an exporter that died.
const ABANDONED: Duration = Duration::from_secs(60);
/// A cache that nothing was added to is written again when it is that old: its age says when it was last of use.
const FRESH: Duration = Duration::from_secs(24 * 60 * 60);

/// What is to be exported, and how.
#[derive(Serialize, Deserialize)]
pub struct Export {
    pub(crate) settings: Settings,
    /// The daemon's.
    pub(crate) address: String,
    /// What was built, as arguments of `buildctl build`; paths in them are relative to the folder.
    pub(crate) arguments: Vec<String>,
    pub(crate) own: String,
    pub(crate) default: String,
    /// A branch of `remote` that may be the default one.
    pub(crate) branch: Option<String>,
    pub(crate) remote: String,
    /// The cache's registry is spoken to in plain HTTP.
    pub(crate) plain: bool,
    /// `username:password` for it.
    pub(crate) login: Option<String>,
    /// Every step was in a cache.
    pub(crate) nothing_new: bool,
}

/// An exporter's folder that waits for [`Aside::start`].
pub(crate) struct Aside(PathBuf);

impl Export {
    /// Moves a run's work folder out of the run, but for what an export has no use for. Nothing works in it any more.
    pub(crate) fn put_aside(&self, work: &Path) -> io::Result<Aside> {
        let run = work.parent().and_then(Path::file_name).ok_or(io::ErrorKind::InvalidInput)?;
        let parent = self.settings.storage.join("layer-cache");
        DirBuilder::new().recursive(true).mode(0o700).create(&parent)?;
        let folder = parent.join(run);
        removed(std::fs::remove_dir_all(&folder))?;
        secret_files::remove(work)?;
        removed(std::fs::remove_dir_all(work.join("git")))?;
        write_private(&work.join(EXPORT), &serde_json::to_vec(self)?)?;
        std::fs::rename(work, &folder)?;
        Ok(Aside(folder))
    }

    fn refs(&self) -> io::Result<CacheRefs> {
        let parse = |text: &str| text.parse().map_err(io::Error::other);
        let (own, default) = (parse(&self.own)?, parse(&self.default)?);
        Ok(CacheRefs { own, default, branch: self.branch.clone() })
    }
}

impl Aside {
    /// Starts a process that exports it. To be called when this process holds nothing any more that such a process may not
    /// inherit.
    pub(crate) fn start(&self) -> io::Result<()> {
        let mut command = exporter(&self.0);
        command.arg("--detach").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let status = command.current_dir("/").status()?;
        if status.success() { Ok(()) } else { Err(io::Error::other(status.to_string())) }
    }
}

/// Exports what was put aside in `folder`. With `detach`, starts a process of its own that does so.
pub fn export(folder: &Path, detach: bool) -> ExitCode {
    let done = if detach { detached(folder) } else { exported(folder) };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            Output::default().say(&format!("cannot export layers: {error}"));
            ExitCode::FAILURE
        }
    }
}

fn exporter(folder: &Path) -> Command {
    // Still this program where its file was replaced meanwhile.
    let mut command = Command::new("/proc/self/exe");
    command.args(["export-layers", "--folder"]).arg(folder);
    command
}

fn detached(folder: &Path) -> io::Result<()> {
    let parent = folder.parent().ok_or(io::ErrorKind::InvalidInput)?;
    let log = File::options().create(true).append(true).open(parent.join(LOG))?;
    if log.metadata()?.len() > LOG_BYTES {
        log.set_len(0)?;
    }
    let mut command = exporter(folder);
    command.current_dir(parent).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    command.spawn().map(drop)
}

fn exported(folder: &Path) -> io::Result<()> {
    // Refused only to who leads a group of processes already, which serves as well.
    let _ = rustix::process::setsid();
    let own = open(&folder.join(OWN_LOCK))?;
    flock(&own, FlockOperation::NonBlockingLockExclusive)?;
    let parent = folder.parent().ok_or(io::ErrorKind::InvalidInput)?;
    remove_abandoned(parent);
    let done = std::fs::read(folder.join(EXPORT)).and_then(|text| {
        let export: Export = serde_json::from_slice(&text)?;
        tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(in_turn(&export, folder))
    });
    remove_folder(folder).and(done)
}

/// What exporters that were killed left.
fn remove_abandoned(parent: &Path) {
    let Ok(folders) = std::fs::read_dir(parent) else { return };
    for folder in folders.flatten().map(|entry| entry.path()).filter(|path| path.is_dir()) {
        let age = folder.metadata().and_then(|metadata| metadata.modified()).map(|time| time.elapsed());
        let lock = open(&folder.join(OWN_LOCK));
        let free = lock.is_ok_and(|lock| flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok());
        if free && matches!(age, Ok(Ok(age)) if age > ABANDONED) {
            let _ = remove_folder(&folder);
        }
    }
}

async fn in_turn(export: &Export, folder: &Path) -> io::Result<()> {
    let children = Children::new(Output::default())?;
    let deadline = Instant::now() + Duration::from_secs(export.settings.layer_cache.export_seconds);
    let work = async {
        let turn = open(&folder.with_file_name(TURN))?;
        while flock(&turn, FlockOperation::NonBlockingLockExclusive).is_err() {
            sleep(LOOK).await;
        }
        run(export, folder, &children, deadline).await
    };
    let done = timeout_at(deadline, work).await.unwrap_or_else(|_| {
        let seconds = export.settings.layer_cache.export_seconds;
        Err(io::Error::other(format!("{} took longer than {seconds} s", export.own)))
    });
    children.end_all().await;
    done
}

async fn run(export: &Export, folder: &Path, children: &Children, deadline: Instant) -> io::Result<()> {
    kiln_registry::install_crypto_provider();
    let refs = export.refs()?;
    let host = refs.own.registry();
    let mut logins = BTreeMap::new();
    let mut keyring = Keyring::default();
    if let Some(login) = export.login.clone().map(SecretString::from) {
        keyring.insert(host, &login).map_err(io::Error::other)?;
        logins.insert(host.to_owned(), login);
    }
    let registry =
        OciRegistry::new(Config { registries: export.settings.registries.clone(), ..Config::default() });
    let access = Access::new(Arc::new(keyring), deadline);
    if export.nothing_new && is_fresh(&registry, &refs, &access).await {
        return Ok(());
    }
    write_private(&folder.join("docker/config.json"), secret_files::registry_logins(&logins).as_bytes())?;
    let mut command = buildkit::command(&export.settings, folder, &export.address);
    // An image manifest is what every registry takes; a layer that an image has too stays as it is there.
    command.args(["build", "--progress=rawjson"]).args(&export.arguments).arg("--export-cache").arg(format!(
        "type=registry,ref={},mode=max,image-manifest=true,oci-mediatypes=true,compression=zstd,registry.insecure={}",
        refs.own, export.plain
    ));
    let began = Instant::now();
    let ended = children.run(command, Show::Nothing).await?;
    if !ended.status.success() {
        let last =
            ended.tail.lines().rfind(|line| line.starts_with("error: ")).unwrap_or("it told no reason");
        return Err(io::Error::other(format!("{}: {last}", refs.own)));
    }
    let is_default = match &refs.branch {
        Some(branch) => {
            context::default_branch(&export.remote, folder, children).await.as_ref() == Some(branch)
        }
        None => false,
    };
    let also: Vec<_> = is_default.then(|| refs.default.selector()).into_iter().collect();
    registry.mark(&refs.own, &also, &now().to_string(), &access).await.map_err(io::Error::other)?;
    children.output().say(&format!("exported {} in {:.1} s", refs.own, began.elapsed().as_secs_f64()));
    Ok(())
}

/// Whether the build's cache was written a short time ago.
async fn is_fresh(registry: &OciRegistry, refs: &CacheRefs, access: &Access) -> bool {
    let Ok(Some(tagged)) = registry.tagged(&refs.own, access).await else { return false };
    let created = tagged.created.and_then(|created| created.parse::<jiff::Timestamp>().ok());
    created.is_some_and(|created| now().duration_since(created).unsigned_abs() < FRESH)
}

#[expect(
    clippy::disallowed_methods,
    reason = "a cache is marked with the time of day at which it was written"
)]
fn now() -> jiff::Timestamp {
    jiff::Timestamp::now()
}
