//! How a build ended, told from what its last run left behind and from the registry's own word.

use std::time::Duration;

use kiln_domain::engine::Observed;
use kiln_domain::failure::{Failure, FailureReason};
use kiln_domain::limits;
use kiln_domain::reference::{Digest, ImageReference};
use kiln_domain::run::{Ended, Findings, RunResult};
use kiln_domain::transition::Change;

use crate::holder::{Held, LetGo, wall_clock};

/// Why a run is judged.
pub(crate) enum Ending {
    /// It ended, was lost, or a cancel ended it.
    Natural,
    /// Its time was up, and we stopped it.
    Deadline,
    /// It can't be started, and why.
    GaveUp(Failure),
}

/// Between two questions to a registry that can't be asked.
const REGISTRY_PAUSE: Duration = Duration::from_secs(2);

impl Held<'_> {
    /// Says how the build ended. Every end of a claimed build comes through here: the run is revoked, nothing of it can push
    /// any more, and only then is the registry asked. (The model shows each of these to be needed, also where the build
    /// can't even be started: an earlier holder may have.)
    pub(crate) async fn conclude(&mut self, ended: Ended, ending: Ending) -> Result<(), LetGo> {
        let mut ended = self.revoked(ended).await?;
        let ending = match ending {
            // An earlier holder acted on the deadline.
            Ending::Natural if ended.was_asked_to_stop() && self.record().is_past_deadline(wall_clock()) => {
                Ending::Deadline
            }
            ending => ending,
        };
        if let Some(outcome) = ended.outcome.take() {
            ended.outcome = Some(self.masked(outcome).await?);
        }
        let findings = ended.outcome.as_ref().map(|outcome| outcome.findings.clone()).unwrap_or_default();
        if let Some(digest) = self.pushed(&ended).await? {
            return self.end(Change::Succeeded { by: self.me.clone(), digest, findings }).await;
        }
        if self.record().cancel.is_some() {
            return self.end(Change::Cancelled { by: Some(self.me.clone()), findings }).await;
        }
        let failure = match (ending, ended.outcome.map(|outcome| outcome.result)) {
            (Ending::Deadline, Some(RunResult::Failed(failure)))
                if failure.reason == FailureReason::Timeout =>
            {
                failure
            }
            (Ending::Deadline, _) => self.took_too_long(&findings).await,
            (_, Some(RunResult::Failed(failure))) => failure,
            (_, Some(RunResult::Pushed(digest))) => {
                let message = format!("the builder reported {digest}, but the image is not there");
                Failure::new(FailureReason::ImageMissing, message)
            }
            (Ending::GaveUp(failure), None) => failure,
            (Ending::Natural, None) if self.record().attempt < limits::ATTEMPTS => {
                let attempt = self.record().attempt;
                return self
                    .retry(&format!("attempt {attempt} was lost: its builder vanished without an outcome"))
                    .await;
            }
            (Ending::Natural, None) => {
                let message =
                    format!("the builder vanished {} times without an outcome", self.record().attempt);
                Failure::new(FailureReason::EngineLost, message)
            }
        };
        self.end(Change::Failed { by: Some(self.me.clone()), failure, findings }).await
    }

    /// Revokes the run, so that no builder of it begins or goes on, and waits until nothing of it can push. Of a run that has
    /// left no outcome it is read again afterwards: one that began late may have written one.
    pub(crate) async fn revoked(&mut self, ended: Ended) -> Result<Ended, LetGo> {
        let run = self.record().run();
        // Who was paused may find the run ended long after another has taken it over.
        self.check()?;
        while let Err(error) = self.shared.engine.revoke(&run).await {
            tracing::warn!(build.id = %run.build(), "run `{run}` can't be revoked now: {error}");
            self.pause(REGISTRY_PAUSE).await?;
        }
        if ended.outcome.is_some() {
            return Ok(ended);
        }
        loop {
            match self.observe().await? {
                Observed::Running(handle) => {
                    if let Err(error) = self.shared.engine.cancel(&run).await {
                        tracing::warn!(build.id = %run.build(), "run `{run}` can't be stopped now: {error}");
                    }
                    if let Some(ended) = self.wait_for(&handle).await? {
                        return Ok(ended);
                    }
                }
                Observed::Ended(ended) => return Ok(ended),
                Observed::Absent => return Ok(Ended::default()),
            }
        }
    }

    /// The digest that this build put at its target, if it did: the one that its builder reported or recorded; and, asked
    /// for the last time, any that was not there before, for what was recorded may be lost.
    async fn pushed(&mut self, ended: &Ended) -> Result<Option<Digest>, LetGo> {
        let reported = ended.outcome.as_ref().and_then(|outcome| match &outcome.result {
            RunResult::Pushed(digest) => Some(digest),
            RunResult::Failed(_) => None,
        });
        let mut found = self.find_target().await?;
        let ours = |found: &Option<Digest>| {
            found.is_some() && (found.as_ref() == reported || *found == ended.recorded)
        };
        // A builder that failed before it recorded a digest has PUT nothing: there is nothing under way.
        let under_way = ended.recorded.is_some() || ended.outcome.is_none() || reported.is_some();
        if !ours(&found) && under_way {
            self.pause(limits::IN_FLIGHT).await?;
            found = self.find_target().await?;
        }
        let is_new = found.is_some() && found != self.record().digest_before;
        Ok(if ours(&found) || is_new { found } else { None })
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
            let found = tokio::select! {
                found = self.shared.resolver.find(&target) => found,
                () = self.stop.cancelled() => return Err(LetGo::Asked),
            };
            match found {
                Ok(found) => return Ok(found),
                Err(error) => {
                    tracing::warn!(build.id = %id, "whether `{target}` is there can't be asked now: {error}");
                    self.pause(REGISTRY_PAUSE).await?;
                }
            }
        }
    }

    async fn took_too_long(&self, findings: &Findings) -> Failure {
        // A builder that was killed, or stands still, has told of no step's time; but of the one that it was at.
        let at = match findings.steps.as_slice() {
            [] => self.shared.logs.last_progress(&self.record().id).await.map(|progress| progress.step),
            _ => None,
        };
        Failure::took_too_long(self.record().timeout(), &findings.steps, at.as_ref())
    }
}
