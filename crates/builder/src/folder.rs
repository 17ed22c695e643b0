//! The run's folder as the builder sees it: what it is to do, whether it may go on, and what it leaves behind.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use kiln_domain::reference::Digest;
use kiln_domain::run::{Outcome, RunSecrets, RunSpec};
use kiln_domain::run_folder::{self, SecretsFile, Settings};

/// A run's folder.
#[derive(Clone, Debug)]
pub(crate) struct Folder {
    path: PathBuf,
}

/// What a builder is given.
pub(crate) struct Task {
    pub(crate) spec: RunSpec,
    pub(crate) secrets: RunSecrets,
    pub(crate) settings: Settings,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum FolderError {
    #[error("cannot read `{file}`")]
    Read { file: &'static str, source: io::Error },
    #[error("`{file}` does not hold what it should")]
    Content { file: &'static str, source: serde_json::Error },
}

impl Folder {
    pub(crate) fn new(path: &Path) -> Self {
        Self { path: path.to_owned() }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The builder's own folder in it.
    pub(crate) fn work(&self) -> PathBuf {
        self.path.join(run_folder::WORK)
    }

    pub(crate) fn spec(&self) -> Result<RunSpec, FolderError> {
        self.json(run_folder::SPEC)
    }

    pub(crate) fn settings(&self) -> Result<Settings, FolderError> {
        self.json(run_folder::SETTINGS)
    }

    /// Spec, secrets (none, where there is no such file) and settings.
    pub(crate) fn task(&self) -> Result<Task, FolderError> {
        let secrets = match self.json::<SecretsFile>(run_folder::SECRETS) {
            Err(FolderError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                SecretsFile::default()
            }
            other => other?,
        };
        Ok(Task { spec: self.spec()?, secrets: secrets.into(), settings: self.settings()? })
    }

    pub(crate) fn is_revoked(&self) -> bool {
        self.has(run_folder::REVOKED)
    }

    pub(crate) fn is_cancelled(&self) -> bool {
        self.has(run_folder::CANCEL)
    }

    /// An earlier builder of this run came as far as the PUT: what it recorded must not be written over, for the PUT may
    /// still be under way.
    pub(crate) fn has_recorded_target(&self) -> bool {
        self.has(run_folder::TARGET_DIGEST)
    }

    pub(crate) fn has_outcome(&self) -> bool {
        self.has(run_folder::OUTCOME)
    }

    /// Leaves the outcome; durable when this returns.
    pub(crate) fn write_outcome(&self, outcome: &Outcome) -> io::Result<()> {
        self.write_durably(run_folder::OUTCOME, &serde_json::to_vec(outcome)?)
    }

    /// Notes the digest that is about to be PUT at the target; durable when this returns.
    pub(crate) fn record_target(&self, digest: &Digest) -> io::Result<()> {
        self.write_durably(run_folder::TARGET_DIGEST, digest.as_str().as_bytes())
    }

    pub(crate) fn remove_secrets(&self) -> io::Result<()> {
        removed(fs::remove_file(self.path.join(run_folder::SECRETS)))
    }

    /// Makes the work folder anew, with a home and a place for temporary files.
    pub(crate) fn make_work(&self) -> io::Result<PathBuf> {
        let work = self.work();
        removed(fs::remove_dir_all(&work))?;
        fs::create_dir(&work)?;
        fs::set_permissions(&work, Permissions::from_mode(0o700))?;
        fs::create_dir(work.join("home"))?;
        fs::create_dir(work.join("tmp"))?;
        Ok(work)
    }

    fn has(&self, file: &str) -> bool {
        // Where that can't be told, the safe answer is that it is there.
        self.path.join(file).try_exists().unwrap_or(true)
    }

    fn json<T: serde::de::DeserializeOwned>(&self, file: &'static str) -> Result<T, FolderError> {
        let text = fs::read(self.path.join(file)).map_err(|source| FolderError::Read { file, source })?;
        serde_json::from_slice(&text).map_err(|source| FolderError::Content { file, source })
    }

    fn write_durably(&self, name: &str, content: &[u8]) -> io::Result<()> {
        let temporary = self.path.join(format!("{name}.new"));
        let mut file = File::create(&temporary)?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(&temporary, self.path.join(name))?;
        File::open(&self.path)?.sync_all()
    }
}

/// Writes a file that only its owner may read.
pub(crate) fn write_private(path: &Path, content: &[u8]) -> io::Result<()> {
    OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(path)?.write_all(content)
}

/// What is gone already counts as removed.
pub(crate) fn removed(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
