//! Platforms other than the daemon's own: known before the build begins, not by a step that can't be executed.

use kiln_domain::failure::{Failure, FailureReason};
use kiln_domain::platform::Platform;
use serde::Deserialize;
use tokio::time::timeout;

use super::{ANSWERING, Buildkit, cannot_run, internal};
use crate::children::Show;
use crate::stages;
use crate::tool::{BuildRequest, ToolError};

#[derive(Deserialize)]
struct Worker {
    platforms: Vec<Named>,
}

#[derive(Deserialize)]
struct Named {
    os: String,
    architecture: String,
}

impl Buildkit {
    /// Fails where a step would have to run on a platform that this daemon can't execute. Where all is copied, it need not.
    pub(super) async fn check_platforms(
        &self,
        request: &BuildRequest,
        address: &str,
    ) -> Result<(), ToolError> {
        if request.platforms.iter().all(|platform| *platform == Platform::default()) {
            return Ok(());
        }
        let text = std::fs::read(&request.dockerfile).map_err(|error| cannot_run(&error))?;
        let Some(step) = stages::first_run(&String::from_utf8_lossy(&text), &request.target) else {
            return Ok(());
        };
        let mut command = self.command(address);
        command.args(["debug", "workers", "--format", "{{json .}}"]);
        let told = timeout(ANSWERING, self.children.run(command, Show::Nothing)).await;
        let told = told.map_err(|_| ToolError::Lost("BuildKit's daemon does not answer".into()))?;
        let told = told.map_err(|error| cannot_run(&error))?.tail;
        let workers: Vec<Worker> = serde_json::from_str(told.trim()).map_err(|error| {
            ToolError::Failed(internal(format!("BuildKit's daemon does not say what it can run: {error}")))
        })?;
        let here: Vec<&Named> = workers.iter().flat_map(|worker| &worker.platforms).collect();
        let runs = |wanted: &&Platform| {
            here.iter().any(|named| named.os == wanted.os && named.architecture == wanted.architecture)
        };
        match request.platforms.iter().find(|wanted| !runs(wanted)) {
            None => Ok(()),
            Some(other) => Err(ToolError::Failed(Failure::new(
                FailureReason::Dockerfile,
                format!(
                    "`{step}` can't run for {other} here: neither is this host one, nor has it an emulator (binfmt_misc) \
                     for it. Steps that only copy can be built for any platform, and so can stages of `--platform=$BUILDPLATFORM`"
                ),
            ))),
        }
    }
}
