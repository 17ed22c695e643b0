//! A run's folder and its builder.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result, bail};
use kiln_domain::failure::{Failure, FailureReason};
use kiln_domain::reference::Digest;
use kiln_domain::run::{Outcome, RunResult, RunSecrets, RunSpec};
use kiln_domain::run_folder::{self, SecretsFile};
use kiln_testkit::workshop::{Workshop, builder_program};

pub(crate) struct Run {
    pub(crate) folder: PathBuf,
    child: Option<Child>,
}

impl Run {
    /// A folder with what the builder is to do.
    pub(crate) fn prepare(workshop: &Workshop, spec: &RunSpec, secrets: &RunSecrets) -> Result<Self> {
        let folder = workshop.runs().join(spec.run.as_str());
        fs::create_dir_all(&folder)?;
        fs::write(folder.join(run_folder::SECRETS), serde_json::to_vec(&SecretsFile::from(secrets))?)?;
        fs::write(folder.join(run_folder::SETTINGS), serde_json::to_vec(&workshop.settings())?)?;
        fs::write(folder.join(run_folder::SPEC), serde_json::to_vec(spec)?)?;
        Ok(Self { folder, child: None })
    }

    /// Starts the builder by hand: its standard input is no lock.
    pub(crate) fn start(&mut self) -> Result<()> {
        let output = File::options().create(true).append(true).open(self.folder.join(run_folder::OUTPUT))?;
        let child = Command::new(builder_program()?)
            .args(["builder", "--run-dir"])
            .arg(&self.folder)
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .spawn()?;
        self.child = Some(child);
        Ok(())
    }

    pub(crate) fn touch(&self, name: &str) -> Result<()> {
        Ok(File::create(self.folder.join(name)).map(drop)?)
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.folder.join(name).exists()
    }

    pub(crate) fn output(&self) -> String {
        fs::read_to_string(self.folder.join(run_folder::OUTPUT)).unwrap_or_default()
    }

    pub(crate) fn pid(&self) -> Option<i32> {
        self.child.as_ref().and_then(|child| child.id().try_into().ok())
    }

    /// The builder's exit status.
    pub(crate) fn wait(&mut self) -> Result<Option<i32>> {
        let mut child = self.child.take().context("not started")?;
        Ok(tokio::task::block_in_place(|| child.wait())?.code())
    }

    pub(crate) fn outcome(&self) -> Result<Outcome> {
        let text = fs::read(self.folder.join(run_folder::OUTCOME))
            .with_context(|| format!("no outcome; {}", self.output()))?;
        Ok(serde_json::from_slice(&text)?)
    }
}

/// Runs a builder to its end: its outcome and output.
pub(crate) fn run(workshop: &Workshop, spec: &RunSpec, secrets: &RunSecrets) -> Result<(Outcome, String)> {
    let mut run = Run::prepare(workshop, spec, secrets)?;
    run.start()?;
    run.wait()?;
    Ok((run.outcome()?, run.output()))
}

pub(crate) fn pushed(outcome: &Outcome) -> Result<Digest> {
    match &outcome.result {
        RunResult::Pushed(digest) => Ok(digest.clone()),
        RunResult::Failed(failure) => bail!("it failed: {failure}"),
    }
}

pub(crate) fn failed(outcome: &Outcome, reason: FailureReason) -> Result<Failure> {
    match &outcome.result {
        RunResult::Failed(failure) if failure.reason == reason => Ok(failure.clone()),
        other => bail!("expected {reason}, not {other:?}"),
    }
}
