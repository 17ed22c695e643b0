//! How a build ended, told from what its last run left behind and from the registry's own word.

use std::time::Duration;

use kiln_domain::failure::{Failure, FailureReason};
use kiln_domain::limits;
use kiln_domain::reference::{Digest, ImageReference};
use kiln_domain::run::{Ended, Findings, RunResult};
use kiln_domain::transition::Change;

use crate::holder::{Held, LetGo};

/// Why we stopped the builder.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stopped {
    Cancelled,
    Deadline,
}

/// A manifest that the builder PUT as its last act may still be under way inside the registry.
const IN_FLIGHT: Duration = Duration::from_secs(2);
/// Between two questions to a registry that can't be asked.
const REGISTRY_PAUSE: Duration = Duration::from_secs(2);

impl Held<'_> {
    /// Says how the build ended, of a run of which nothing can push any more.
    pub(crate) async fn conclude(&mut self, ended: Ended, stopped: Option<Stopped>) -> Result<(), LetGo> {
        let mut ended = match ended.outcome {
            Some(_) => ended,
            // Lost, or never begun: whoever is late to start it must find that it is over.
            None => self.wait_for_end(None).await?,
        };
        if let Some(outcome) = ended.outcome.take() {
            ended.outcome = Some(self.masked(outcome).await?);
        }
        let findings = ended.outcome.as_ref().map(|outcome| outcome.findings.clone()).unwrap_or_default();
        if let Some(digest) = self.pushed(&ended).await? {
            return self.end(Change::Succeeded { by: self.me.clone(), digest, findings }).await;
        }
        let stopped = if self.record().cancel.is_some() { Some(Stopped::Cancelled) } else { stopped };
        match (stopped, ended.outcome.map(|outcome| outcome.result)) {
            (Some(Stopped::Cancelled), _) => {
                self.end(Change::Cancelled { by: Some(self.me.clone()), findings }).await
            }
            (Some(Stopped::Deadline), result) => {
                let failure = match result {
                    Some(RunResult::Failed(failure)) if failure.reason == FailureReason::Timeout => failure,
                    _ => self.took_too_long(&findings),
                };
                self.fail(failure, findings).await
            }
            (None, Some(RunResult::Failed(failure))) => self.fail(failure, findings).await,
            (None, Some(RunResult::Pushed(digest))) => {
                let message = format!("the builder reported {digest}, but the image is not there");
                self.fail(Failure::new(FailureReason::ImageMissing, message), findings).await
            }
            (None, None) if self.record().attempt < limits::ATTEMPTS => {
                let attempt = self.record().attempt;
                self.retry(&format!("attempt {attempt} was lost: its builder vanished without an outcome")).await
            }
            (None, None) => {
                let message = format!("the builder vanished {} times without an outcome", self.record().attempt);
                self.fail(Failure::new(FailureReason::EngineLost, message), findings).await
            }
        }
    }

    async fn fail(&mut self, failure: Failure, findings: Findings) -> Result<(), LetGo> {
        self.end(Change::Failed { by: Some(self.me.clone()), failure, findings }).await
    }

    /// The digest that this build put at its target, if it did.
    async fn pushed(&mut self, ended: &Ended) -> Result<Option<Digest>, LetGo> {
        for look in 0..2 {
            if look > 0 {
                self.pause(IN_FLIGHT).await?;
            }
            let found = self.find_target().await?;
            let ours = match (&ended.outcome, &ended.recorded) {
                (Some(outcome), recorded) => match &outcome.result {
                    RunResult::Pushed(digest) => found.as_ref() == Some(digest),
                    // It had not come to the PUT: there is nothing to wait for.
                    RunResult::Failed(_) if recorded.is_none() => return Ok(None),
                    RunResult::Failed(_) => found == *recorded,
                },
                (None, Some(recorded)) => found.as_ref() == Some(recorded),
                // What it recorded can't be read: an image that wasn't there before is this build's.
                (None, None) => found.is_some() && found != self.record().digest_before,
            };
            if ours {
                return Ok(found);
            }
        }
        Ok(None)
    }

    /// What lies at the target, asked until the registry answers: a build's end is never guessed.
    pub(crate) async fn find_target(&mut self) -> Result<Option<Digest>, LetGo> {
        let id = self.record().id.clone();
        let target: ImageReference = match self.record().target_ref.parse() {
            Ok(target) => target,
            Err(error) => {
                tracing::error!(build.id = %id, "the record of `{id}` can't be read: {error}");
                return Ok(None);
            }
        };
        loop {
            match self.shared.resolver.find(&target).await {
                Ok(found) => return Ok(found),
                Err(error) => {
                    tracing::warn!(build.id = %id, "whether `{target}` is there can't be asked now: {error}");
                    self.pause(REGISTRY_PAUSE).await?;
                }
            }
        }
    }

    fn took_too_long(&self, findings: &Findings) -> Failure {
        let longest = findings.steps.iter().max_by_key(|step| step.duration_ms);
        let what = longest.map(|step| format!("; what ran longest: step {} ({})", step.number, step.name));
        let limit = self.record().timeout();
        Failure::new(FailureReason::Timeout, format!("took longer than {limit:?}{}", what.unwrap_or_default()))
    }
}
