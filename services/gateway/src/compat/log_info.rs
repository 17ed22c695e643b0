//! Where clients of the compatible API read logs by themselves: the supervisor's URL and the workspace's owner token. An
//! orchestrator is asked, and answers sealed with a key that only this process has: the token lies nowhere on the bus.

use std::collections::BTreeMap;
use std::time::Duration;

use kiln_bus::seal::{OpenKey, SealError};
use kiln_bus::secrets::open_accesses;
use kiln_contract::error::{Code, Refusal};
use kiln_contract::orchestrator as ask;
use kiln_contract::secrets::{OthersBuild, OutputAccess};
use kiln_domain::id::RunId;
use kiln_proto::builder as api;

use crate::ask::Asker;

/// An engine answers from what it knows, or asks its place once.
const PATIENCE: Duration = Duration::from_secs(15);
/// A run of which it isn't known yet is asked about again after so long.
const AGAIN: Duration = Duration::from_millis(500);

/// Who asks orchestrators for it.
#[derive(Clone)]
pub(crate) struct LogInfos {
    asker: Asker,
    key: OpenKey,
}

/// What is known of running builds' logs, and of others' builds.
pub(crate) struct Known {
    pub(crate) runs: BTreeMap<String, api::LogInfo>,
    pub(crate) others: Vec<api::BuildInfo>,
    not_yet: Vec<String>,
}

impl LogInfos {
    pub(crate) fn new(asker: Asker) -> Result<Self, SealError> {
        Ok(Self { asker, key: OpenKey::from_seed(OpenKey::new_seed()?)? })
    }

    pub(crate) async fn ask(&self, runs: Vec<String>, others: bool) -> Result<Known, Refusal> {
        let question = ask::OutputAccess { runs, others, seal_to: self.key.public().to_owned() };
        let answer = self.asker.ask(&question, PATIENCE).await?;
        let accesses = open_accesses(&self.key, &answer.sealed)
            .map_err(|error| Refusal::new(Code::Internal, error.to_string()))?;
        Ok(Known {
            runs: accesses.runs.into_iter().map(|(run, access)| (run, log_info(access))).collect(),
            others: accesses.others.into_iter().map(build_info).collect(),
            not_yet: answer.not_yet,
        })
    }

    /// That of a run, asked for until it is known; `None` where there is none.
    pub(crate) async fn of(&self, run: &RunId) -> Option<api::LogInfo> {
        loop {
            match self.ask(vec![run.to_string()], false).await {
                Ok(mut known) => {
                    let found = known.runs.remove(run.as_str());
                    if found.is_some() || known.not_yet.is_empty() {
                        return found;
                    }
                }
                Err(error) => {
                    tracing::debug!(run.id = %run, "where the log of `{run}` is can't be asked now: {error}");
                }
            }
            tokio::time::sleep(AGAIN).await;
        }
    }
}

fn log_info(access: OutputAccess) -> api::LogInfo {
    api::LogInfo { url: access.url, headers: access.headers.into_iter().collect() }
}

fn build_info(build: OthersBuild) -> api::BuildInfo {
    api::BuildInfo {
        r#ref: build.target_ref,
        status: api::BuildStatus::Running.into(),
        started_at: build.started_at.map_or(0, |at| at.as_second()),
        base_ref: build.base_ref,
        build_id: build.id,
        log_info: build.output.map(log_info),
    }
}
