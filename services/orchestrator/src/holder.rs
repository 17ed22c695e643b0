//! Holding a build: from the claim to its end, or until the claim is lost.
//!
//! *Append first, act after*: a start follows the claim that stands in the journal, a kill follows `cancel_requested`
//! or a passed deadline. Whoever loses an append reads the tail, and goes on only if the last claim is still its own.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use kiln_bus::journal::{AppendError, Entry};
use kiln_domain::engine::{EngineError, Handle, Observed};
use kiln_domain::failure::{Failure, FailureReason};
use kiln_domain::id::InstanceId;
use kiln_domain::record::Record;
use kiln_domain::run::{Ended, Findings, RunSecrets, RunSpec, Work};
use kiln_domain::source::Source;
use kiln_domain::transition::Change;
use tokio_util::sync::CancellationToken;
use tracing::Instrument as _;

use crate::Shared;
use crate::conclude::Stopped;

/// Between two tries of what the engine can't do now.
const ENGINE_PAUSE: Duration = Duration::from_secs(1);
/// Before the first restart after a lost builder; each later one waits twice as long.
const RETRY_PAUSE: Duration = Duration::from_secs(2);
/// How much later than the builder itself the holder acts on the deadline: the builder knows better what it was at.
const DEADLINE_GRACE: Duration = Duration::from_secs(5);

/// Why a build is let go of without its end.
pub(crate) enum LetGo {
    /// The claim is no longer ours, or the build is over.
    Lost,
    /// The process is asked to end.
    Asked,
}

/// A build that we hold, with its last event as we know it.
pub(crate) struct Held<'a> {
    pub(crate) shared: &'a Shared,
    pub(crate) me: InstanceId,
    pub(crate) tail: Entry,
    stop: &'a CancellationToken,
}

/// Acts on a claimed build until it is over, the claim is lost, or `stop`. Gives the sequence of the event that ended our
/// claim; 0 if the claim may still stand, as after a lease that could not be renewed for a while.
pub(crate) async fn hold(shared: &Arc<Shared>, claimed: Entry, stop: &CancellationToken) -> u64 {
    let Some(me) = claimed.record.claimed_by.clone() else { return 0 };
    let id = claimed.record.id.clone();
    let span = tracing::info_span!("hold", build.id = %id);
    async {
        let mut held = Held { shared, me, tail: claimed, stop };
        match held.see_to_its_end().await {
            Ok(()) => tracing::info!(build.id = %id, "build `{id}` ended: {}", held.tail.record.state),
            Err(LetGo::Lost) => tracing::info!(build.id = %id, "build `{id}` is no longer ours"),
            Err(LetGo::Asked) => held.release().await,
        }
        if held.record().claimed_by.is_none() { held.tail.sequence } else { 0 }
    }
    .instrument(span)
    .await
}

impl Held<'_> {
    pub(crate) fn record(&self) -> &Record {
        &self.tail.record
    }

    async fn see_to_its_end(&mut self) -> Result<(), LetGo> {
        loop {
            self.check()?;
            if self.record().state.is_terminal() {
                return Ok(());
            }
            let run = self.record().run();
            match self.record().handle.clone() {
                _ if self.record().cancel.is_some() => {
                    let ended = self.stop_builder().await?;
                    self.conclude(ended, Some(Stopped::Cancelled)).await?;
                }
                None if self.queue_time_is_up() => {
                    let message = "nobody had a free slot for it in time";
                    self.end(failed(FailureReason::QueueExpired, message, &self.me)).await?;
                }
                None => self.start().await?,
                Some(handle) => {
                    tracing::debug!(build.id = %run.build(), "following run `{run}`");
                    self.follow(&handle).await?;
                }
            }
        }
    }

    /// Whether we may act: the lease stands and the process goes on.
    pub(crate) fn check(&self) -> Result<(), LetGo> {
        if self.shared.holders.me().as_ref() != Some(&self.me) {
            return Err(LetGo::Lost);
        }
        if self.stop.is_cancelled() { Err(LetGo::Asked) } else { Ok(()) }
    }

    #[expect(clippy::disallowed_methods, reason = "a limit is compared with the stream's wall-clock time")]
    fn queue_time_is_up(&self) -> bool {
        self.record().started_at.is_none() && self.record().queue_deadline().is_some_and(|at| at < Timestamp::now())
    }

    /// Starts the present attempt's builder, or finds the one that another holder started.
    async fn start(&mut self) -> Result<(), LetGo> {
        let run = self.record().run();
        // Only the first holder of a first attempt knows that nobody can have started it.
        if self.record().claims > 1 || self.record().attempt > 1 {
            match self.observe().await? {
                Observed::Running(handle) => return self.started(handle).await,
                Observed::Ended(ended) => return self.conclude(ended, None).await,
                Observed::Absent if self.record().claims > 1 && self.image_is_new().await? => {
                    return self.conclude(Ended::default(), None).await;
                }
                Observed::Absent => {}
            }
        }
        let spec = match self.spec() {
            Ok(spec) => spec,
            Err(message) => return self.end(failed(FailureReason::Internal, message, &self.me)).await,
        };
        let secrets = match self.secrets().await {
            Ok(secrets) => secrets,
            Err(Some(message)) => return self.end(failed(FailureReason::Internal, message, &self.me)).await,
            Err(None) => return self.pause(ENGINE_PAUSE).await,
        };
        match self.shared.engine.start(&spec, &secrets).await {
            Ok(handle) => self.started(handle).await,
            Err(EngineError::Rejected(failure)) => {
                let change = Change::Failed { by: Some(self.me.clone()), failure, findings: Findings::default() };
                self.end(change).await
            }
            // Revoked by one who took this run for lost and then lost its claim before it could say so.
            Err(EngineError::Revoked | EngineError::Gone) => {
                let ended = self.wait_for_end(None).await?;
                self.conclude(ended, None).await
            }
            Err(error @ EngineError::Unavailable(_)) => {
                tracing::warn!(build.id = %run.build(), "run `{run}` can't be started yet: {error}");
                self.pause(ENGINE_PAUSE).await
            }
        }
    }

    async fn started(&mut self, handle: Handle) -> Result<(), LetGo> {
        let engine = self.shared.engine.name().to_owned();
        let change = Change::Started { by: self.me.clone(), handle, engine: engine.clone() };
        if self.append(&change).await? {
            self.shared.metrics.started(&self.tail);
            let run = self.record().run();
            tracing::info!(build.id = %run.build(), "run `{run}` started on {engine}");
        }
        Ok(())
    }

    /// Follows a started builder until it ends, is to be stopped, or we let go.
    async fn follow(&mut self, handle: &Handle) -> Result<(), LetGo> {
        let run = self.record().run();
        let engine = self.shared.engine.clone();
        let ended = engine.ended(&run, handle);
        tokio::pin!(ended);
        let deadline = tokio::time::sleep(self.time_left());
        tokio::pin!(deadline);
        loop {
            let changed = self.changed();
            tokio::select! {
                ended = &mut ended => return match ended {
                    Ok(ended) => self.conclude(ended, None).await,
                    Err(EngineError::Gone | EngineError::Revoked) => self.conclude(Ended::default(), None).await,
                    Err(error) => {
                        tracing::warn!(build.id = %run.build(), "run `{run}` can't be watched now: {error}");
                        self.pause(ENGINE_PAUSE).await
                    }
                },
                () = &mut deadline => {
                    let ended = self.stop_builder().await?;
                    return self.conclude(ended, Some(Stopped::Deadline)).await;
                }
                change = changed => if self.take(change)? { return Ok(()) },
            }
        }
    }

    #[expect(clippy::disallowed_methods, reason = "a deadline is compared with the stream's wall-clock time")]
    fn time_left(&self) -> Duration {
        let deadline = self.record().deadline();
        let left = deadline.and_then(|at| Duration::try_from(at.duration_since(Timestamp::now())).ok());
        left.unwrap_or_default() + DEADLINE_GRACE
    }

    /// The build's next event after the one that we know, or `None` when it is time to look at our lease again.
    fn changed(&self) -> impl Future<Output = Option<Entry>> + use<> {
        let (view, id, known) = (self.shared.view.clone(), self.record().id.clone(), self.tail.sequence);
        let (stop, mut changes) = (self.stop.clone(), self.shared.view.changes());
        async move {
            let newer = async {
                loop {
                    if let Some(entry) = view.get(&id).filter(|entry| entry.sequence > known) {
                        return (*entry).clone();
                    }
                    let _ = changes.recv().await;
                }
            };
            tokio::select! {
                newer = newer => Some(newer),
                () = stop.cancelled() => None,
                () = tokio::time::sleep(Duration::from_secs(1)) => None,
            }
        }
    }

    /// Takes a newer event as the tail. `true` if what is to be done may be another thing now.
    fn take(&mut self, newer: Option<Entry>) -> Result<bool, LetGo> {
        self.check()?;
        let Some(newer) = newer.filter(|newer| newer.sequence > self.tail.sequence) else { return Ok(false) };
        let before = std::mem::replace(&mut self.tail, newer);
        if self.record().claimed_by.as_ref() != Some(&self.me) && !self.record().state.is_terminal() {
            return Err(LetGo::Lost);
        }
        Ok(self.record().state.is_terminal() || self.record().cancel != before.record.cancel)
    }

    /// What the engine knows of the present run; asked again until it can say.
    pub(crate) async fn observe(&mut self) -> Result<Observed, LetGo> {
        let run = self.record().run();
        loop {
            match self.shared.engine.observe(&run).await {
                Ok(observed) => return Ok(observed),
                Err(error) => {
                    tracing::warn!(build.id = %run.build(), "run `{run}` can't be observed now: {error}");
                    self.pause(ENGINE_PAUSE).await?;
                }
            }
        }
    }

    /// Asks the builder to stop and waits until nothing of it can push.
    async fn stop_builder(&mut self) -> Result<Ended, LetGo> {
        let run = self.record().run();
        loop {
            match self.shared.engine.cancel(&run).await {
                Ok(()) => break,
                Err(error) => {
                    tracing::warn!(build.id = %run.build(), "run `{run}` can't be stopped now: {error}");
                    self.pause(ENGINE_PAUSE).await?;
                }
            }
        }
        let handle = self.record().handle.clone();
        self.wait_for_end(handle).await
    }

    /// Waits until nothing of the present run can push. A run that is absent, or left no outcome, is revoked first: a
    /// start that is still under way somewhere then finds that it must not begin.
    pub(crate) async fn wait_for_end(&mut self, handle: Option<Handle>) -> Result<Ended, LetGo> {
        let run = self.record().run();
        let mut handle = handle;
        loop {
            if let Some(known) = handle.take() {
                let engine = self.shared.engine.clone();
                let ended = engine.ended(&run, &known);
                tokio::pin!(ended);
                let outcome = loop {
                    tokio::select! {
                        ended = &mut ended => break ended,
                        () = tokio::time::sleep(Duration::from_secs(1)) => self.check()?,
                        () = self.stop.cancelled() => return Err(LetGo::Asked),
                    }
                };
                if let Ok(ended) = outcome
                    && ended.outcome.is_some()
                {
                    return Ok(ended);
                }
            }
            if let Err(error) = self.shared.engine.revoke(&run).await {
                tracing::warn!(build.id = %run.build(), "run `{run}` can't be revoked now: {error}");
                self.pause(ENGINE_PAUSE).await?;
                continue;
            }
            match self.observe().await? {
                Observed::Running(running) => {
                    if let Err(error) = self.shared.engine.cancel(&run).await {
                        tracing::warn!(build.id = %run.build(), "run `{run}` can't be stopped now: {error}");
                    }
                    handle = Some(running);
                }
                Observed::Ended(ended) => return Ok(ended),
                Observed::Absent => return Ok(Ended::default()),
            }
        }
    }

    /// Whether another image lies at the target than when the build was accepted.
    async fn image_is_new(&mut self) -> Result<bool, LetGo> {
        let found = self.find_target().await?;
        Ok(found.is_some() && found != self.record().digest_before)
    }

    fn spec(&self) -> Result<RunSpec, String> {
        let record = self.record();
        let parse = |reference: &str| reference.parse().map_err(|error| format!("a record can't be read: {error}"));
        let base_ref = parse(&record.base_ref)?;
        let work = match (&record.source, &record.commit) {
            (Source::Dockerfile(source), Some(commit)) if !record.base_exists => {
                Work::Build { source: source.clone(), commit: commit.clone(), base_ref }
            }
            (Source::Dockerfile(_), None) => return Err("the record has no commit".into()),
            _ => Work::Copy { from: base_ref, platform: kiln_domain::platform::Platform::default() },
        };
        Ok(RunSpec {
            run: record.run(),
            work,
            target_ref: parse(&record.target_ref)?,
            timeout_ms: record.timeout_ms,
            no_cache: record.no_cache,
            plain_http: self.shared.config.plain_http.clone(),
            file_remotes: self.shared.config.file_remotes,
            traceparent: record.traceparent.clone(),
        })
    }

    /// The build's secrets, opened. `Err(None)`: they can't be read now.
    async fn secrets(&self) -> Result<RunSecrets, Option<String>> {
        let sealed = self.shared.secrets.get(&self.record().id).await.map_err(|error| {
            tracing::warn!(build.id = %self.record().id, "the build's secrets can't be read now: {error}");
            None
        })?;
        let sealed = sealed.ok_or_else(|| Some("the build's secrets are gone".to_owned()))?;
        let secrets = kiln_bus::secrets::open(&self.shared.open_key, &sealed).map_err(|error| Some(error.to_string()))?;
        Ok(RunSecrets {
            git_username: secrets.git_username,
            git_password: Some(secrets.git_password).filter(|password| !password.is_empty()).map(Into::into),
            registries: secrets.registry.credentials.into_iter().map(|(host, pair)| (host, pair.into())).collect(),
            mounts: secrets.mounts.into_iter().map(|(id, content)| (id, content.into())).collect(),
        })
    }

    /// Appends a change of ours. `false` if it came too late: then the tail is another, and all is to be decided anew.
    pub(crate) async fn append(&mut self, change: &Change) -> Result<bool, LetGo> {
        loop {
            // A holder that is asked to end may still append what it did.
            match self.check() {
                Ok(()) | Err(LetGo::Asked) => {}
                lost @ Err(LetGo::Lost) => lost?,
            }
            match self.shared.journal.append(Some(&self.tail), change, &self.me).await {
                Ok(entry) => {
                    self.tail = entry;
                    return Ok(true);
                }
                Err(AppendError::Lost | AppendError::Illegal(_)) => {
                    let last = self.shared.journal.last_of_build(&self.record().id).await;
                    match last {
                        Ok(Some(last)) if last.sequence > self.tail.sequence => {
                            let joined_only = last.record.cancel == self.record().cancel
                                && last.record.claims == self.record().claims
                                && !last.record.state.is_terminal();
                            self.take(Some(last))?;
                            // Somebody joined: what we were about to say is as true as before.
                            if !joined_only {
                                return Ok(false);
                            }
                        }
                        Ok(_) => return Ok(false),
                        Err(error) => {
                            tracing::warn!(build.id = %self.record().id, "the journal can't be read now: {error}");
                            tokio::time::sleep(ENGINE_PAUSE).await;
                        }
                    }
                }
                Err(AppendError::Bus(error)) => {
                    tracing::warn!(build.id = %self.record().id, "`{}` can't be appended now: {error}", change.event());
                    tokio::time::sleep(ENGINE_PAUSE).await;
                }
            }
        }
    }

    /// Appends the build's end.
    pub(crate) async fn end(&mut self, change: Change) -> Result<(), LetGo> {
        if self.append(&change).await? {
            self.shared.metrics.ended(&self.tail);
        }
        Ok(())
    }

    /// Appends `retrying`, then waits before the next attempt.
    pub(crate) async fn retry(&mut self, why: &str) -> Result<(), LetGo> {
        let pause = RETRY_PAUSE * self.record().attempt;
        if self.append(&Change::Retrying { by: self.me.clone(), why: why.to_owned() }).await? {
            self.shared.metrics.retried();
            self.pause(pause).await?;
        }
        Ok(())
    }

    /// Waits, unless we are to let go.
    pub(crate) async fn pause(&self, pause: Duration) -> Result<(), LetGo> {
        tokio::select! {
            () = self.stop.cancelled() => {}
            () = tokio::time::sleep(pause) => {}
        }
        self.check()
    }

    async fn release(&mut self) {
        if self.record().state.is_terminal() {
            return;
        }
        let change = Change::Released { by: self.me.clone() };
        if self.append(&change).await.is_err() {
            tracing::info!(build.id = %self.record().id, "the build was lost before it could be released");
        }
    }
}

fn failed(reason: FailureReason, message: impl Into<String>, by: &InstanceId) -> Change {
    Change::Failed { by: Some(by.clone()), failure: Failure::new(reason, message), findings: Findings::default() }
}
