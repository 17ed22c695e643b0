//! Holding a build: from the claim to its end, or until the claim is lost.
//!
//! *Append first, act after*: a start follows the claim that stands in the journal, a kill follows `cancel_requested`
//! or a passed deadline. Whoever loses an append reads the tail, and goes on only if the last claim is still its own.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use kiln_bus::journal::Entry;
use kiln_domain::engine::{EngineError, Handle, Observed};
use kiln_domain::failure::{Failure, FailureReason};
use kiln_domain::id::InstanceId;
use kiln_domain::limits;
use kiln_domain::record::{Record, State};
use kiln_domain::run::Ended;
use kiln_domain::source::Source;
use kiln_domain::transition::Change;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::Instrument as _;

use crate::Shared;
use crate::conclude::Ending;
use crate::mask::WITHHELD;

/// Between two tries of what the engine can't do now.
pub(crate) const ENGINE_PAUSE: Duration = Duration::from_secs(1);
/// So often a holder tries to start a builder; then another may, and a slot is free for a build that can be started.
const STARTS: u32 = 3;
/// How much later than the builder itself the holder acts on the deadline: the builder knows better what it was at.
const DEADLINE_GRACE: Duration = Duration::from_secs(5);

/// Why a build is let go of without its end.
pub(crate) enum LetGo {
    /// The claim is no longer ours.
    Lost,
    /// The process is asked to end.
    Asked,
    /// The journal knows the build no more: its stream was deleted or emptied.
    Gone,
    /// The engine does not start its builder, and what it says.
    CantStart(String),
}

/// A build that we hold, with its last event as we know it.
pub(crate) struct Held<'a> {
    pub(crate) shared: &'a Shared,
    pub(crate) me: InstanceId,
    pub(crate) tail: Entry,
    pub(crate) stop: &'a CancellationToken,
    /// Since when the target's registry does not say what lies there.
    pub(crate) unanswered_since: Option<Instant>,
}

/// Acts on a claimed build until it is over, the claim is lost, or `stop`. Gives the sequence of the event that ended our
/// claim; 0 if the claim may still stand, as after a lease that could not be renewed for a while.
pub(crate) async fn hold(shared: &Arc<Shared>, claimed: Entry, stop: &CancellationToken) -> u64 {
    let Some(me) = claimed.record.claimed_by.clone() else { return 0 };
    let id = claimed.record.id.clone();
    let span = tracing::info_span!("hold", build.id = %id);
    kiln_bus::trace::continue_from(&span, &claimed.record.traceparent);
    async {
        let mut held = Held { shared, me, tail: claimed, stop, unanswered_since: None };
        match held.see_to_its_end().await {
            Ok(()) => tracing::info!(build.id = %id, "build `{id}` ended: {}", held.tail.record.state),
            Err(LetGo::Lost) => tracing::info!(build.id = %id, "build `{id}` is no longer ours"),
            Err(LetGo::Gone) => held.end_unknown().await,
            Err(LetGo::Asked) => held.release(None).await,
            Err(LetGo::CantStart(why)) => {
                let why = held.masked_text(&why).await.unwrap_or_else(|_| WITHHELD.to_owned());
                tracing::warn!(build.id = %id, "build `{id}` can't be started here for now: {why}");
                held.release(Some(why)).await;
            }
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
        let (mut starts, mut complaint) = (0, None);
        loop {
            self.check()?;
            if self.record().state.is_terminal() {
                return Ok(());
            }
            let run = self.record().run();
            match self.record().handle.clone() {
                _ if self.record().cancel.is_some() => {
                    let ended = self.stop_builder().await?;
                    self.conclude(ended, Ending::Natural).await?;
                }
                None if self.record().has_waited_too_long(wall_clock()) => {
                    let failure = self.record().queue_expired(complaint.as_deref());
                    self.conclude(Ended::default(), Ending::GaveUp(failure)).await?;
                }
                None => {
                    let pause = self.record().not_before().map(time_until).unwrap_or_default();
                    if !pause.is_zero() {
                        self.wait(pause).await?;
                    } else if let Err(error) = self.start().await? {
                        starts += 1;
                        let why = error.to_string();
                        if starts >= STARTS {
                            return Err(LetGo::CantStart(why));
                        }
                        tracing::warn!(build.id = %run.build(), "run `{run}` can't be started yet: {why}");
                        complaint = Some(self.masked_text(&why).await?);
                        self.wait(ENGINE_PAUSE).await?;
                    }
                }
                Some(handle) => {
                    tracing::debug!(build.id = %run.build(), "following run `{run}`");
                    self.follow(&handle).await?;
                }
            }
        }
    }

    /// Ends the builder of a build that is in the journal no more: nobody could learn how it ended. Its output and secrets
    /// are the clean-up's.
    async fn end_unknown(&mut self) {
        let run = self.record().run();
        let id = run.build();
        self.shared.metrics.lost();
        tracing::error!(build.id = %id, "the journal lost build `{id}`: its stream was deleted or emptied; its builder is ended");
        if self.revoked(Ended::default()).await.is_err() {
            tracing::warn!(build.id = %id, "the builder of `{id}` is left to the clean-up");
        }
    }

    /// Whether the journal still knows the build.
    async fn check_known(&self) -> Result<(), LetGo> {
        let (view, id) = (&self.shared.view, &self.record().id);
        if !view.is_caught_up() || view.get(id).is_some() {
            return Ok(());
        }
        // The view only shows; what decides is the leader's word.
        match self.shared.journal.last_of_build(id).await {
            Ok(None) => Err(LetGo::Gone),
            Ok(Some(_)) | Err(_) => Ok(()),
        }
    }

    /// Whether we may act: the lease stands and the process goes on.
    pub(crate) fn check(&self) -> Result<(), LetGo> {
        if self.shared.holders.me().as_ref() != Some(&self.me) {
            return Err(LetGo::Lost);
        }
        if self.stop.is_cancelled() { Err(LetGo::Asked) } else { Ok(()) }
    }

    /// Starts the present attempt's builder, or finds the one that another holder started. The inner error is the engine's:
    /// it may be tried again.
    async fn start(&mut self) -> Result<Result<(), EngineError>, LetGo> {
        let run = self.record().run();
        // Only the first holder of a first attempt knows that nobody can have started it.
        if self.record().claims > 1 {
            match self.shared.engine.observe(&run).await {
                Ok(Observed::Running(handle)) => return self.started(handle).await.map(Ok),
                Ok(Observed::Ended(ended)) => return self.conclude(ended, Ending::Natural).await.map(Ok),
                Ok(Observed::Absent) => {
                    // What another holder started may be lost whole; its last PUT may still be under way.
                    self.pause(limits::IN_FLIGHT).await?;
                    match self.ask_target().await?.flatten() {
                        Err(error) => return Err(LetGo::CantStart(error.to_string())),
                        Ok(found) if found.is_some() && found != self.record().digest_before => {
                            return self.conclude(Ended::default(), Ending::Natural).await.map(Ok);
                        }
                        Ok(_) => {}
                    }
                }
                Err(error) => return Ok(Err(error)),
            }
        }
        let ready = match self.spec() {
            Ok(spec) => match self.secrets(&spec).await {
                Ok(secrets) => Ok((spec, secrets)),
                Err(None) => return self.wait(ENGINE_PAUSE).await.map(Ok),
                Err(Some(message)) => Err(message),
            },
            Err(message) => Err(message),
        };
        let (spec, secrets) = match ready {
            Ok(ready) => ready,
            Err(message) => {
                let failure = Failure::new(FailureReason::Internal, message);
                return self.conclude(Ended::default(), Ending::GaveUp(failure)).await.map(Ok);
            }
        };
        self.check()?;
        match self.shared.engine.start(&spec, &secrets).await {
            Ok(handle) => self.started(handle).await.map(Ok),
            Err(EngineError::Rejected(failure)) => {
                let failure = Failure::new(failure.reason, self.masked_text(&failure.message).await?);
                self.conclude(Ended::default(), Ending::GaveUp(failure)).await.map(Ok)
            }
            // Revoked by one who took this run for lost and then lost its claim before it could say so.
            Err(EngineError::Revoked | EngineError::Gone) => {
                self.conclude(Ended::default(), Ending::Natural).await.map(Ok)
            }
            Err(error @ EngineError::Unavailable(_)) => Ok(Err(error)),
        }
    }

    async fn started(&mut self, handle: Handle) -> Result<(), LetGo> {
        let engine = self.shared.engine.name().to_owned();
        let executes = matches!(self.record().source, Source::Dockerfile(_)) && !self.record().base_exists;
        let build_tool = self.shared.engine.build_tool().filter(|_| executes).unwrap_or_default();
        let by = self.me.clone();
        let change = Change::Started { by, handle, engine: engine.clone(), build_tool };
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
                    Ok(ended) => self.conclude(ended, Ending::Natural).await,
                    Err(EngineError::Gone | EngineError::Revoked) => {
                        self.conclude(Ended::default(), Ending::Natural).await
                    }
                    Err(error) => {
                        tracing::warn!(build.id = %run.build(), "run `{run}` can't be watched now: {error}");
                        self.pause(ENGINE_PAUSE).await
                    }
                },
                () = &mut deadline => {
                    // After a take-over the time may be up before the engine has told of an end that came in time.
                    let (ended, ending) = match self.observe().await? {
                        Observed::Running(_) => (self.stop_builder().await?, Ending::Deadline),
                        Observed::Ended(ended) => (ended, Ending::Natural),
                        Observed::Absent => (Ended::default(), Ending::Natural),
                    };
                    return self.conclude(ended, ending).await;
                }
                change = changed => {
                    if change.is_none() {
                        self.check_known().await?;
                    }
                    if self.take(change)? {
                        return Ok(());
                    }
                }
            }
        }
    }

    /// Until we act on the deadline. It counts from `started`, whoever holds the build by now.
    fn time_left(&self) -> Duration {
        let act_at = self.record().deadline().and_then(|at| at.checked_add(DEADLINE_GRACE).ok());
        act_at.map(time_until).unwrap_or_default()
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
    pub(crate) fn take(&mut self, newer: Option<Entry>) -> Result<bool, LetGo> {
        self.check()?;
        let Some(newer) = newer.filter(|newer| newer.sequence > self.tail.sequence) else { return Ok(false) };
        let before = std::mem::replace(&mut self.tail, newer);
        self.check_claim()?;
        Ok(self.record().state.is_terminal() || self.record().cancel != before.record.cancel)
    }

    /// Whether the tail leaves the build to us: it is over, or our claim is the last, in a state that we know.
    pub(crate) fn check_claim(&self) -> Result<(), LetGo> {
        let Record { state, claimed_by, .. } = self.record();
        let ours = claimed_by.as_ref() == Some(&self.me) && *state != State::Unknown;
        if ours || state.is_terminal() { Ok(()) } else { Err(LetGo::Lost) }
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
            self.check()?;
            match self.shared.engine.cancel(&run).await {
                Ok(()) => break,
                Err(error) => {
                    tracing::warn!(build.id = %run.build(), "run `{run}` can't be stopped now: {error}");
                    self.pause(ENGINE_PAUSE).await?;
                }
            }
        }
        match self.record().handle.clone() {
            Some(handle) => Ok(self.wait_for(&handle).await?.unwrap_or_default()),
            None => Ok(Ended::default()),
        }
    }

    /// Waits for a run's end; `None` where the engine can't say, and it is to be observed.
    pub(crate) async fn wait_for(&mut self, handle: &Handle) -> Result<Option<Ended>, LetGo> {
        let (engine, run) = (self.shared.engine.clone(), self.record().run());
        let ended = engine.ended(&run, handle);
        tokio::pin!(ended);
        loop {
            tokio::select! {
                ended = &mut ended => return Ok(ended.ok()),
                () = tokio::time::sleep(Duration::from_secs(1)) => self.check()?,
                () = self.stop.cancelled() => return Err(LetGo::Asked),
            }
        }
    }

    /// Waits, unless what is to be done becomes another thing, or we are to let go.
    async fn wait(&mut self, pause: Duration) -> Result<(), LetGo> {
        let waited = tokio::time::sleep(pause);
        tokio::pin!(waited);
        loop {
            let changed = self.changed();
            tokio::select! {
                () = &mut waited => return self.check(),
                change = changed => if self.take(change)? { return Ok(()) },
            }
        }
    }

    /// Waits, unless we are to let go.
    pub(crate) async fn pause(&self, pause: Duration) -> Result<(), LetGo> {
        tokio::select! {
            () = self.stop.cancelled() => {}
            () = tokio::time::sleep(pause) => {}
        }
        self.check()
    }
}

/// None if it is past.
fn time_until(at: Timestamp) -> Duration {
    at.duration_since(wall_clock()).try_into().unwrap_or_default()
}

#[expect(clippy::disallowed_methods, reason = "a limit is compared with the stream's wall-clock time")]
pub(crate) fn wall_clock() -> Timestamp {
    Timestamp::now()
}
