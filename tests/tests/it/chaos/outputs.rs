//! What builders wrote, kept beyond its removal: a second name for each run's output as soon as there is one.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;
use kiln_domain::id::RunId;
use kiln_domain::run_folder;

/// An output is there for as long as its build runs, and then until its log is complete: seconds at the least.
const LOOK: Duration = Duration::from_millis(100);

pub(super) struct Outputs {
    runs: PathBuf,
    kept: PathBuf,
}

impl Outputs {
    /// `kept`: a folder on the disk of `runs`.
    pub(super) fn new(runs: &Path, kept: &Path) -> Result<Self> {
        std::fs::create_dir_all(kept)?;
        Ok(Self { runs: runs.to_owned(), kept: kept.to_owned() })
    }

    /// Keeps every output that appears. Never returns.
    pub(super) async fn keep(&self) {
        loop {
            for run in std::fs::read_dir(&self.runs).into_iter().flatten().flatten() {
                let (output, kept) = (run.path().join(run_folder::OUTPUT), self.kept.join(run.file_name()));
                let Ok(found) = std::fs::metadata(&output) else { continue };
                // A start that came to nothing takes its output away, and the next start makes another.
                if std::fs::metadata(&kept).is_ok_and(|kept| kept.ino() == found.ino()) {
                    continue;
                }
                let _ = std::fs::remove_file(&kept);
                // It may be gone again.
                let _ = std::fs::hard_link(&output, &kept);
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// What each run wrote.
    pub(super) fn read(&self) -> Result<BTreeMap<RunId, Vec<u8>>> {
        let mut outputs = BTreeMap::new();
        for kept in std::fs::read_dir(&self.kept)? {
            let kept = kept?;
            let Some(Ok(run)) = kept.file_name().to_str().map(str::parse) else { continue };
            outputs.insert(run, std::fs::read(kept.path())?);
        }
        Ok(outputs)
    }
}
