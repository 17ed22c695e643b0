//! An orchestrator's algorithm: "Holders and claims" and "Running a build" of the design, one outside act a step.

use std::sync::Arc;

use kiln_domain::failure::FailureReason;
use kiln_domain::id::InstanceId;
use kiln_domain::limits;
use kiln_domain::record::Record;

use super::builder::{Observed, Outcome};
use super::faults::Fault;
use super::journal::{Act, Append, BEFORE, Entry, Image};
use super::lifecycle::System;
use super::rules::Rules;

#[derive(Clone, Debug, PartialEq)]
pub(super) struct Holder {
    pub(super) index: u8,
    /// Each life is an instance of its own.
    pub(super) life: u8,
    pub(super) instance: Arc<InstanceId>,
    /// Its lease is in the bucket.
    pub(super) lease: bool,
    /// The last event that it read, of a build that it acts on: every append expects this sequence.
    pub(super) known: Option<Entry>,
    pub(super) phase: Phase,
    /// It will not start this build.
    pub(super) gives_up: bool,
}

/// What it is about to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Phase {
    /// It has no claim.
    Idle,
    /// Its claim, not started: look whether a run is there. `first`: nobody can have started it before.
    Observe {
        first: bool,
    },
    /// None is there: look, 2 s later, whether the target has changed.
    AskBefore,
    Start,
    /// Started: wait for its end, or for a cancel.
    Watch,
    /// Cancelled: ask the engine to end it.
    Stop,
    Stopping,
    /// Put `revoked` in the run's place, so that no builder of it begins any more.
    Revoke,
    /// Wait for the lock, then read what the run left, and ask the registry.
    Read,
    /// Ask once more, 2 s later.
    AskAgain(Found),
    /// The design as it was: `revoked` only before `retrying`.
    RevokeLate,
    Append(Act),
    /// The append's answer was lost: read the last event back.
    Unsure,
}

/// What a run that has ended left behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Found {
    outcome: Option<Outcome>,
    recorded: Option<Image>,
}

/// How the world answers a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    Usual,
    /// The append is done, its acknowledgement lost.
    LostAfter,
    /// The append is on its way, and the caller was told that it failed.
    LostBefore,
    /// A builder process that has yet to begin is not seen.
    Overlooked,
    /// No time is left in the queue, or the engine refuses.
    GivesUp,
}

impl Holder {
    /// It begins knowing nothing.
    pub(super) fn new(index: u8, life: u8) -> Self {
        let instance = InstanceId::new("o", u64::from(index * 16 + life)).expect("an instance id");
        let instance = Arc::new(instance);
        Self { index, life, instance, lease: true, known: None, phase: Phase::Idle, gives_up: false }
    }

    pub(super) fn holds(&self, record: &Record) -> bool {
        record.claimed_by.as_ref() == Some(&*self.instance)
    }

    /// It comes back as a new instance.
    pub(super) fn rebirth(&mut self) {
        *self = Self::new(self.index, self.life + 1);
    }

    /// Where a holder stands that has just read the record: that alone decides.
    pub(super) fn read(&mut self, last: &Entry) {
        self.phase = match &*last.record {
            record if record.state.is_terminal() => Phase::Idle,
            record if !self.holds(record) => Phase::Idle,
            record if record.cancel.is_some() => Phase::Stop,
            record if record.handle.is_some() => Phase::Watch,
            _ => Phase::Observe { first: false },
        };
        self.gives_up = false;
        self.known = (self.phase != Phase::Idle).then(|| last.clone());
    }
}

/// The next step of holder `me`; none where it waits.
pub(super) fn step(system: &mut System, rules: &Rules, me: usize, answer: Answer) -> Option<()> {
    let holder = system.holders.get(me)?.clone();
    let last = system.journal.last.clone();
    let record = &holder.known.as_ref().unwrap_or(&last).record;
    let attempt = usize::try_from(record.attempt).ok()? - 1;
    let overlook = answer == Answer::Overlooked;
    let appends = matches!(holder.phase, Phase::Append(_));
    let looks = matches!(holder.phase, Phase::Observe { .. });
    let gives_up = holder.phase == Phase::Start || (looks && !rules.every_end_is_judged);
    let observes = matches!(holder.phase, Phase::Observe { .. } | Phase::Watch | Phase::Stopping);
    match answer {
        Answer::Usual => {}
        Answer::Overlooked if observes && system.runs.get(attempt)?.waiting > 0 => {
            system.faults.suffer(Fault::Overlooked)?;
        }
        Answer::GivesUp if gives_up => system.faults.suffer(Fault::GivingUp)?,
        Answer::LostAfter | Answer::LostBefore if appends => system.faults.suffer(Fault::LostAck)?,
        _ => return None,
    }
    let mine = holder.holds(record);
    let free = system.is_free(record);
    let orphaned = system.has_orphaned_put();
    let run = system.runs.get_mut(attempt)?;
    let finished = run.outcome.is_some() && !rules.revoked_whatever_is_left;
    let judge = if rules.revoked_first && !finished { Phase::Revoke } else { Phase::Read };
    let next = match holder.phase {
        Phase::Observe { .. } | Phase::Start if answer == Answer::GivesUp => {
            system.holders.get_mut(me)?.gives_up = true;
            if rules.every_end_is_judged {
                judge
            } else {
                Phase::Append(Act::Failed(FailureReason::Internal))
            }
        }
        Phase::Idle => {
            if record.state.is_terminal() || !holder.lease || !(free || mine) {
                return None;
            }
            if mine {
                // A claim that was thought lost has arrived.
                system.holders.get_mut(me)?.read(&last);
                return Some(());
            }
            system.holders.get_mut(me)?.known = Some(last.clone());
            if !rules.append_first_act_after {
                let _revoked_or_not = run.start();
            }
            Phase::Append(Act::Claimed)
        }
        Phase::Observe { first } => match run.observe(overlook) {
            Observed::Absent if first => Phase::Start,
            Observed::Absent => Phase::AskBefore,
            Observed::Running => Phase::Append(Act::Started),
            Observed::Ended => judge,
        },
        // Within these 2 s a PUT whose sender is dead has arrived, or never will.
        Phase::AskBefore if orphaned && rules.asked_again => return None,
        Phase::AskBefore if system.registry.tag != BEFORE => judge,
        Phase::AskBefore => Phase::Start,
        Phase::Start => match run.start() {
            Ok(()) => Phase::Append(Act::Started),
            // Who revoked it died before saying so.
            Err(_) => judge,
        },
        Phase::Watch | Phase::Stopping => match run.observe(overlook) {
            Observed::Running => return None,
            Observed::Absent | Observed::Ended => judge,
        },
        Phase::Stop => {
            run.killed = true;
            Phase::Stopping
        }
        Phase::Revoke => {
            run.revoked = true;
            Phase::Read
        }
        Phase::Read => {
            if rules.lock_awaited && run.builder.is_some() {
                return None;
            }
            let found = Found { outcome: run.outcome, recorded: run.recorded };
            let has_put = found.outcome != Some(Outcome::Failed) || found.recorded.is_some();
            match found.image(rules, system.registry.tag, !rules.asked_again) {
                // Only we could start a builder, and it failed before it PUT: not asked for.
                _ if !has_put && (!rules.asked_unless_alone || (record.attempt, record.claims) == (1, 1)) => {
                    found.otherwise(rules, &holder, record)
                }
                Some(image) => Phase::Append(Act::Succeeded(image)),
                None if rules.asked_again => Phase::AskAgain(found),
                None => found.otherwise(rules, &holder, record),
            }
        }
        Phase::AskAgain(_) if orphaned => return None,
        Phase::AskAgain(found) => match found.image(rules, system.registry.tag, true) {
            Some(image) => Phase::Append(Act::Succeeded(image)),
            None => found.otherwise(rules, &holder, record),
        },
        Phase::RevokeLate => {
            run.revoked = true;
            Phase::Append(Act::Retrying)
        }
        Phase::Append(act) => return append(system, rules, me, act, answer),
        Phase::Unsure => {
            system.holders.get_mut(me)?.read(&last);
            return Some(());
        }
    };
    if next == Phase::Append(Act::Retrying) && !rules.append_first_act_after {
        let _revoked_or_not = system.runs.get_mut(attempt + 1)?.start();
    }
    system.holders.get_mut(me)?.phase = next;
    Some(())
}

fn append(system: &mut System, rules: &Rules, me: usize, act: Act, answer: Answer) -> Option<()> {
    let holder = system.holders.get_mut(me)?;
    let append = Append { after: holder.known.clone()?, by: Some(InstanceId::clone(&holder.instance)), act };
    if answer == Answer::LostBefore {
        if system.on_its_way.is_some() {
            return None;
        }
        system.on_its_way = Some(append);
        holder.phase = Phase::Unsure;
        return Some(());
    }
    let appended = system.journal.append(rules, &append);
    match answer {
        Answer::LostAfter if appended.is_err() => return None,
        Answer::LostAfter => holder.phase = Phase::Unsure,
        _ if act == Act::Released && appended.is_ok() => holder.rebirth(),
        _ => {
            holder.read(&system.journal.last);
            let first = act == Act::Retrying || system.journal.last.record.claims == 1;
            if appended.is_ok() && first && holder.phase == (Phase::Observe { first: false }) {
                holder.phase = Phase::Observe { first };
            }
        }
    }
    Some(())
}

impl Found {
    /// The image of this run, if that is what is at the target.
    fn image(&self, rules: &Rules, tag: Image, last: bool) -> Option<Image> {
        let pushed = match self.outcome {
            Some(Outcome::Pushed(image)) => Some(image),
            _ => None,
        };
        let ours = if rules.any_new_image_is_ours {
            (last && tag != BEFORE) || [pushed, self.recorded].contains(&Some(tag))
        } else {
            pushed.or(self.recorded).map_or(tag != BEFORE, |image| image == tag)
        };
        ours.then_some(tag)
    }

    /// What becomes of the build where the image is not there.
    fn otherwise(&self, rules: &Rules, holder: &Holder, record: &Record) -> Phase {
        Phase::Append(match self.outcome {
            _ if record.cancel.is_some() => Act::Cancelled,
            Some(Outcome::Failed) => Act::Failed(FailureReason::Dockerfile),
            Some(Outcome::Pushed(_)) => Act::Failed(FailureReason::ImageMissing),
            None if holder.gives_up => Act::Failed(FailureReason::Internal),
            None if record.attempt >= limits::ATTEMPTS => Act::Failed(FailureReason::EngineLost),
            None if rules.revoked_first => Act::Retrying,
            None => return Phase::RevokeLate,
        })
    }
}
