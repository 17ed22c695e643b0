//! Base images, brought into the storage that buildah's builds share before a build asks for them.
//!
//! A build still asks its registry what a FROM is, with its own credentials; what it then finds in the storage are layers
//! that it need not fetch. They are pulled without credentials: nothing comes in this way that not all may have.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kiln_domain::reference::ImageReference;
use kiln_domain::run_folder::Settings;
use kiln_registry::{Access, Config, Error, OciRegistry};
use rustix::fs::{FlockOperation, flock};
use tokio::process::Command;
use tokio::time::timeout;

use crate::buildah::{Storage, tell_registries};
use crate::children::Children;
use crate::choice::{Tool, choose};
use crate::folder::write_private;
use crate::tool::Ways;

/// Longest time that a pull may take.
const PULL_WITHIN: Duration = Duration::from_secs(30 * 60);
const ASK_WITHIN: Duration = Duration::from_secs(30);

/// The storage of this host's builds, as far as base images go.
#[derive(Debug)]
pub struct BaseImages {
    settings: Settings,
    /// What buildah is told, and what keeps two processes from pulling at once.
    work: PathBuf,
    registry: OciRegistry,
}

impl BaseImages {
    /// None where builds use another storage than buildah's.
    pub fn open(settings: &Settings) -> io::Result<Option<Self>> {
        if choose(settings) != Ok(Tool::Buildah) {
            return Ok(None);
        }
        let work = settings.storage.join("base-images");
        std::fs::create_dir_all(work.join("tmp"))?;
        std::fs::create_dir_all(Storage::of(settings).root())?;
        let http = Config { registries: settings.registries.clone(), ..Config::default() };
        Ok(Some(Self { settings: settings.clone(), work, registry: OciRegistry::new(http) }))
    }

    /// How much a pull of this image moves at most.
    pub async fn bytes(&self, image: &ImageReference) -> Result<u64, Error> {
        let access = Access::anonymous(ASK_WITHIN);
        for mirror in self.settings.registries.mirrored(image) {
            if let Ok(bytes) = self.registry.bytes(&mirror, &access).await {
                return Ok(bytes);
            }
        }
        self.registry.bytes(image, &access).await
    }

    /// Pulls it, at the lowest priority; what is there already is not fetched again. An error says why it is not there.
    pub async fn pull(&self, image: &ImageReference) -> io::Result<()> {
        let _alone = self.alone()?;
        let registry = image.registry();
        let registries = &self.settings.registries;
        let pulled_from = [registry].into_iter().chain(registries.mirrors(registry)).collect();
        tell_registries(&self.work, &Ways { registries, pulled_from, pushed_to: registry })?;
        write_private(&self.work.join("auth.json"), b"{}")?;
        let mut command = self.command("pull");
        command
            .arg("--quiet")
            .arg("--signature-policy")
            .arg(self.work.join("policy.json"))
            .arg("--authfile")
            .arg(self.work.join("auth.json"))
            .arg("--")
            .arg(format!("docker://{image}"));
        ended(command).await
    }

    /// Gives an image up; layers that something else is made of stay.
    pub async fn remove(&self, image: &ImageReference) -> io::Result<()> {
        let mut command = self.command("rmi");
        command.arg("--").arg(image.to_string());
        ended(command).await
    }

    fn command(&self, verb: &str) -> Command {
        let mut command = Children::command(Path::new("nice"), &self.work);
        command.args(["-n", "19", "buildah"]);
        command.env("CONTAINERS_REGISTRIES_CONF", self.work.join("registries.conf"));
        Storage::of(&self.settings).use_by(&mut command);
        command.arg(verb).kill_on_drop(true);
        command
    }

    /// Held by the one process of this host that pulls.
    fn alone(&self) -> io::Result<File> {
        let path = self.work.join("lock");
        let file = OpenOptions::new().create(true).truncate(false).write(true).open(path)?;
        flock(&file, FlockOperation::NonBlockingLockExclusive)
            .map_err(|_| io::Error::other("another process of this host is pulling"))?;
        Ok(file)
    }
}

async fn ended(mut command: Command) -> io::Result<()> {
    let ended = timeout(PULL_WITHIN, command.output()).await.map_err(|_| io::ErrorKind::TimedOut)??;
    if ended.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&ended.stderr);
    let last = text.lines().map(str::trim).rfind(|line| !line.is_empty());
    Err(io::Error::other(last.unwrap_or("buildah failed and said nothing").to_owned()))
}
