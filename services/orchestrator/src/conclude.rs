//! How a build ended, told from what its last run left behind and from the registry's own word.

use std::time::Duration;

use kiln_contract::error::{Code, Refusal};
use kiln_domain::engine::Observed;
use kiln_domain::failure::{Failure, FailureReason};
use kiln_domain::limits;
use kiln_domain::record::Record;
use kiln_domain::reference::{Digest, ImageReference};
use kiln_domain::run::{Ended, Findings, RunResult};
use kiln_domain::transition::Change;
use tokio::time::Instant;

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
        let unanswered = match self.pushed(&ended).await? {
            Ok(Some(digest)) => {
                return self.end(Change::Succeeded { by: self.me.clone(), digest, findings }).await;
            }
            Ok(None) => None,
            Err(unanswered) => Some(unanswered),
        };
        let may_be_there = unanswered.is_some() && (ended.recorded.is_some() || has_pushed(&ended));
        if self.record().cancel.is_some() && !may_be_there {
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
            (_, Some(RunResult::Pushed(digest))) => match unanswered {
                None => {
                    let message = format!("the builder reported {digest}, but the image is not there");
                    Failure::new(FailureReason::ImageMissing, message)
                }
                Some(Failure { reason, message }) => {
                    Failure::new(reason, format!("the builder reported {digest}, but {message}"))
                }
            },
            (Ending::GaveUp(failure), None) => failure,
            (Ending::Natural, None) if unanswered.is_none() && self.record().attempt < limits::ATTEMPTS => {
                let attempt = self.record().attempt;
                return self
                    .retry(&format!("attempt {attempt} was lost: its builder vanished without an outcome"))
                    .await;
            }
            (Ending::Natural, None) => unanswered.unwrap_or_else(|| {
                let attempt = self.record().attempt;
                let message = format!("the builder vanished {attempt} times without an outcome");
                Failure::new(FailureReason::EngineLost, message)
            }),
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
    /// for the last time, any that was not there before, for what was recorded may be lost. The inner error: nobody says.
    async fn pushed(&mut self, ended: &Ended) -> Result<Result<Option<Digest>, Failure>, LetGo> {
        let outcome = ended.outcome.as_ref().map(|outcome| &outcome.result);
        let reported = match outcome {
            Some(RunResult::Pushed(digest)) => Some(digest),
            Some(RunResult::Failed(_)) | None => None,
        };
        // Whether anything can have been PUT, and still be under way.
        let has_put = ended.recorded.is_some()
            || outcome.is_none()
            || reported.is_some()
            || !self.shared.engine.records_before_put();
        let Record { attempt, claims, .. } = self.record();
        if !has_put && (*attempt, *claims) == (1, 1) {
            // Nor has any other builder: we alone could start one. A user's error waits for no registry.
            return Ok(Ok(None));
        }
        let mut found = match self.find_target().await? {
            Ok(found) => found,
            Err(unanswered) => return Ok(Err(unanswered)),
        };
        let ours = |found: &Option<Digest>| {
            found.is_some() && (found.as_ref() == reported || *found == ended.recorded)
        };
        if !ours(&found) && has_put {
            self.pause(limits::IN_FLIGHT).await?;
            found = match self.find_target().await? {
                Ok(found) => found,
                Err(unanswered) => return Ok(Err(unanswered)),
            };
        }
        let is_new = found.is_some() && found != self.record().digest_before;
        Ok(Ok(if ours(&found) || is_new { found } else { None }))
    }

    /// What lies at the target, asked until the registry answers: a build's end is not guessed. Nor is it waited for for
    /// ever: a registry that has told us nothing for `registry_limit_seconds` is the inner error.
    pub(crate) async fn find_target(&mut self) -> Result<Result<Option<Digest>, Failure>, LetGo> {
        let id = self.record().id.clone();
        loop {
            let error = match self.ask_target().await? {
                Ok(Ok(found)) => {
                    self.unanswered_since = None;
                    return Ok(Ok(found));
                }
                // No registry's doing, and no reason to give up.
                Err(unasked) => {
                    tracing::warn!(build.id = %id, "whether the image of `{id}` is there can't be asked now: {unasked}");
                    self.pause(REGISTRY_PAUSE).await?;
                    continue;
                }
                Ok(Err(error)) => error,
            };
            tracing::warn!(build.id = %id, "whether the image of `{id}` is there was not learnt: {error}");
            let limit = self.shared.config.registry_limit_seconds;
            let since = *self.unanswered_since.get_or_insert_with(Instant::now);
            if since.elapsed() >= Duration::from_secs(limit) {
                let reason = match error.code {
                    Code::PermissionDenied | Code::Unauthenticated => FailureReason::RegistryDenied,
                    _ => FailureReason::RegistryUnavailable,
                };
                let target = &self.record().target_ref;
                let message =
                    format!("whether `{target}` is there could not be learnt for {limit} s: {error}");
                return Ok(Err(Failure::new(reason, message)));
            }
            self.pause(REGISTRY_PAUSE).await?;
        }
    }

    /// The same, asked once. The inner refusal is the registry's, the other one says that no resolver could be asked.
    pub(crate) async fn ask_target(
        &mut self,
    ) -> Result<Result<Result<Option<Digest>, Refusal>, Refusal>, LetGo> {
        let target: ImageReference = match self.record().target_ref.parse() {
            Ok(target) => target,
            Err(error) => {
                let id = &self.record().id;
                tracing::error!(build.id = %id, "the record of `{id}` can't be read: {error}");
                return Ok(Ok(Ok(None)));
            }
        };
        tokio::select! {
            found = self.shared.resolver.find(&target) => Ok(found),
            () = self.stop.cancelled() => Err(LetGo::Asked),
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

fn has_pushed(ended: &Ended) -> bool {
    matches!(&ended.outcome, Some(outcome) if matches!(outcome.result, RunResult::Pushed(_)))
}
