//! The first model: a build's life, from `queued` to its end, among two holders, their builders and a canceller.

use std::hash::{Hash, Hasher};

use kiln_domain::failure::FailureReason;
use kiln_domain::record::{Record, State};
use stateright::{Model, Property};

use super::builder::{Builder, Registry, Run, Stage};
use super::faults::{Fault, Faults};
use super::holder::{Answer, Holder, Phase, step};
use super::journal::{Act, Append, Entry, Journal, digest};
use super::rules::Rules;

pub(super) struct Lifecycle {
    pub(super) rules: Rules,
    pub(super) faults: Faults,
    /// Somebody asks, at some time, that the build be cancelled.
    pub(super) cancel: bool,
    /// Each builder makes again the image that was there before (a forced build, or a copy).
    pub(super) reproducible: bool,
}

/// All that there is, in one moment.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct System {
    pub(super) journal: Journal,
    /// An append whose author was told that it failed, and which may still arrive.
    pub(super) on_its_way: Option<Append>,
    pub(super) holders: [Holder; 2],
    pub(super) canceller: Canceller,
    /// By attempt.
    pub(super) runs: [Run; 3],
    pub(super) registry: Registry,
    pub(super) faults: Faults,
}

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Canceller {
    Reads,
    Appends(Append),
    Done,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// The holder's next step.
    Step(usize, Answer),
    /// The holder's view gets what it has not seen.
    View(usize),
    Crash(usize),
    Lapse(usize),
    /// It finds that its lease has lapsed.
    Notice(usize),
    Release(usize),
    /// The append on its way arrives.
    Arrive,
    Cancel,
    /// A process that was started for a run gets the run's lock.
    Begin(usize),
    Proceed(usize),
    Fail(usize),
    PushSeemsToFail(usize),
    Die(usize),
    /// Clean-up of an ended build; a fault before.
    Remove(usize),
    /// The PUT in flight is applied.
    Land,
    /// It never is: its sender died while sending.
    Drop,
}

impl Hash for System {
    /// Only what can still make a difference, so that states which differ in nothing else are one: of a sequence, whether
    /// it is the last; of an instance, whether it lives.
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        let last = &self.journal.last;
        let summary = |entry: &Entry| {
            let record = &entry.record;
            let holder = self.holders.iter().position(|holder| holder.holds(record));
            let asked = (record.handle.is_some(), record.cancel.is_some());
            let end = (record.state, record.reason, record.digest.clone());
            (entry.sequence == last.sequence, record.attempt, record.claims.min(2), holder, asked, end)
        };
        (summary(last), self.journal.ends, self.journal.illegal).hash(hasher);
        for holder in &self.holders {
            (holder.lease, holder.phase, holder.gives_up, holder.known.as_ref().map(summary)).hash(hasher);
        }
        if let Some(append) = &self.on_its_way {
            (summary(&append.after), append.act, &append.by, &append.after.record.claimed_by).hash(hasher);
            self.holders.each_ref().map(|holder| holder.life).hash(hasher);
        }
        match &self.canceller {
            Canceller::Reads => 0.hash(hasher),
            Canceller::Appends(append) => (summary(&append.after), append.act).hash(hasher),
            Canceller::Done => 1.hash(hasher),
        }
        (&self.runs, &self.registry, self.faults).hash(hasher);
    }
}

impl System {
    /// No live instance has the claim. (The holder's key is read from the leader.)
    pub(super) fn is_free(&self, record: &Record) -> bool {
        !self.holders.iter().any(|holder| holder.lease && holder.holds(record))
    }

    /// A PUT is in flight whose sender is dead.
    pub(super) fn has_orphaned_put(&self) -> bool {
        self.registry.in_flight.is_some_and(|image| {
            let sender = Builder { image, stage: Stage::Putting };
            !self.runs.iter().any(|run| run.builder.as_ref() == Some(&sender))
        })
    }

    /// Nobody has tried to claim it.
    fn is_untouched(&self) -> bool {
        let idle = self.holders.iter().all(|holder| holder.phase == Phase::Idle);
        idle && self.on_its_way.is_none() && self.record().claims == 0
    }

    fn record(&self) -> &Record {
        &self.journal.last.record
    }

    fn ended(&self) -> bool {
        self.record().state.is_terminal()
    }

    fn perform(&mut self, model: &Lifecycle, action: Action) -> Option<()> {
        let rules = &model.rules;
        match action {
            // The holders are alike: that the first one begins stands for both.
            Action::Step(1, _) if self.is_untouched() => None,
            Action::Step(me, answer) => step(self, rules, me, answer),
            Action::View(me) => {
                let last = &self.journal.last;
                let holder = self.holders.get_mut(me)?;
                let news = holder.known.as_ref().is_some_and(|known| known.sequence != last.sequence);
                (news && holder.phase == Phase::Watch).then(|| holder.read(last))
            }
            Action::Crash(me) => {
                let holder = self.holders.get_mut(me)?;
                if holder.phase == Phase::Idle {
                    return None;
                }
                holder.rebirth();
                self.faults.suffer(Fault::Crash)
            }
            Action::Lapse(me) => {
                let holder = self.holders.get_mut(me)?;
                if holder.phase == Phase::Idle || !holder.lease {
                    return None;
                }
                holder.lease = false;
                self.faults.suffer(Fault::Lapse)
            }
            Action::Notice(me) => {
                let holder = self.holders.get_mut(me)?;
                (!holder.lease).then(|| holder.rebirth())
            }
            Action::Release(me) => {
                let holder = self.holders.get_mut(me)?;
                if holder.phase != Phase::Watch {
                    return None;
                }
                holder.phase = Phase::Append(Act::Released);
                self.faults.suffer(Fault::Release)
            }
            Action::Arrive => {
                let append = self.on_its_way.take()?;
                let _arrived_too_late = self.journal.append(rules, &append);
                Some(())
            }
            Action::Cancel => self.cancel(rules),
            Action::Begin(run) => {
                self.runs.get_mut(run)?.begin(if model.reproducible { None } else { u8::try_from(run).ok() })
            }
            Action::Proceed(run) => self.runs.get_mut(run)?.proceed(rules, &mut self.registry),
            Action::Fail(run) => self.runs.get_mut(run)?.fail(false),
            Action::PushSeemsToFail(run) => {
                self.runs.get_mut(run)?.fail(true)?;
                self.faults.suffer(Fault::LostAck)
            }
            Action::Die(run) => {
                let run = self.runs.get_mut(run)?;
                run.die()?;
                if run.killed { Some(()) } else { self.faults.suffer(Fault::BuilderDeath) }
            }
            Action::Remove(run) => {
                // A pod is not gone within the two seconds in which a PUT that it sent may arrive.
                let (ended, too_soon) = (self.ended(), self.has_orphaned_put());
                let run = self.runs.get_mut(run)?;
                if !run.spec || run.builder.is_some() || too_soon {
                    return None;
                }
                run.remove();
                run.revoked |= ended;
                if ended { Some(()) } else { self.faults.suffer(Fault::Removal) }
            }
            Action::Land => self.registry.land(),
            Action::Drop => {
                let orphaned = self.has_orphaned_put();
                self.registry.in_flight.take_if(|_| orphaned).map(drop)
            }
        }
    }

    /// What can only be refused is forgotten at once: the states that it would tell apart are the same.
    fn forget(&mut self, rules: &Rules) {
        self.on_its_way.take_if(|append| self.journal.is_too_late(rules, append));
        if matches!(&self.canceller, Canceller::Appends(append) if self.journal.is_too_late(rules, append)) {
            self.canceller = Canceller::Reads;
        }
    }

    fn cancel(&mut self, rules: &Rules) -> Option<()> {
        self.canceller = match std::mem::replace(&mut self.canceller, Canceller::Done) {
            Canceller::Reads if self.ended() => Canceller::Done,
            Canceller::Reads => {
                let after = self.journal.last.clone();
                let act = if after.record.claims == 0 { Act::Cancelled } else { Act::CancelRequested };
                Canceller::Appends(Append { after, by: None, act })
            }
            Canceller::Appends(append) => match self.journal.append(rules, &append) {
                Ok(()) => Canceller::Done,
                Err(_) => Canceller::Reads,
            },
            Canceller::Done => return None,
        };
        Some(())
    }
}

impl Model for Lifecycle {
    type State = System;
    type Action = Action;

    fn init_states(&self) -> Vec<System> {
        let journal = Journal::queued();
        vec![System {
            on_its_way: None,
            holders: [0, 1].map(|index| Holder::new(index, 0)),
            canceller: if self.cancel { Canceller::Reads } else { Canceller::Done },
            runs: Default::default(),
            registry: Registry::new(),
            faults: self.faults,
            journal,
        }]
    }

    fn actions(&self, _: &System, actions: &mut Vec<Action>) {
        actions.extend([Action::Arrive, Action::Cancel, Action::Land, Action::Drop]);
        for me in 0..2 {
            let answers = [Answer::Usual, Answer::LostAfter, Answer::LostBefore];
            let answers = answers.into_iter().chain([Answer::Overlooked, Answer::GivesUp]);
            actions.extend(answers.map(|answer| Action::Step(me, answer)));
            actions.extend([Action::View(me), Action::Crash(me), Action::Lapse(me)]);
            actions.extend([Action::Notice(me), Action::Release(me)]);
        }
        for run in 0..3 {
            actions.extend([Action::Begin(run), Action::Proceed(run), Action::Fail(run)]);
            actions.extend([Action::PushSeemsToFail(run), Action::Die(run), Action::Remove(run)]);
        }
    }

    fn next_state(&self, system: &System, action: Action) -> Option<System> {
        let mut next = system.clone();
        next.perform(self, action)?;
        next.forget(&self.rules);
        Some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut properties = vec![
            Property::always("one terminal event", |_, system: &System| system.journal.ends <= 1),
            Property::always("every change is legal", |_, system: &System| !system.journal.illegal),
            Property::always("never two builders", |_, system: &System| {
                let at_work = system.runs.iter().filter(|run| run.is_at_work()).count();
                at_work + usize::from(system.has_orphaned_put()) <= 1
            }),
            Property::always("state and image agree", agree),
            Property::always("nothing runs on for nobody", |_, system: &System| {
                let Registry { tag, in_flight, .. } = system.registry;
                let quiet =
                    !system.runs.iter().any(Run::is_at_work) && in_flight.is_none_or(|image| image == tag);
                quiet || !system.ended()
            }),
            Property::eventually("the build ends", |_, system: &System| system.ended()),
        ];
        properties.extend(sometimes());
        properties
    }
}

/// Succeeded: the image that it names is at the target, for ever. Else: none of its runs' images is, ever.
fn agree(_: &Lifecycle, system: &System) -> bool {
    let tag = system.registry.tag;
    let record = system.record();
    match record.state {
        State::Succeeded => record.digest == Some(digest(tag)),
        State::Failed | State::Cancelled => !system.registry.pushed,
        State::Queued | State::Running | State::Unknown => true,
    }
}

/// That the model can do what it is about: without these, the properties above might hold of nothing.
fn sometimes() -> Vec<Property<Lifecycle>> {
    fn ended(system: &System, state: State) -> bool {
        system.record().state == state
    }
    vec![
        Property::sometimes("succeeds", |_, system: &System| ended(system, State::Succeeded)),
        Property::sometimes("fails by the user's doing", |_, system: &System| {
            system.record().reason == Some(FailureReason::Dockerfile)
        }),
        Property::sometimes("fails because the engine refuses", |_, system: &System| {
            system.record().reason == Some(FailureReason::Internal)
        }),
        Property::sometimes(
            "succeeds in its second attempt, under its second holder",
            |_, system: &System| {
                let record = system.record();
                ended(system, State::Succeeded) && record.attempt == 2 && record.claims == 2
            },
        ),
        Property::sometimes("cancelled before a claim", |model: &Lifecycle, system: &System| {
            let unclaimed = ended(system, State::Cancelled) && system.record().claims == 0;
            unclaimed || !model.cancel
        }),
        Property::sometimes("cancelled while it runs", |model: &Lifecycle, system: &System| {
            let started = ended(system, State::Cancelled) && system.record().handle.is_some();
            started || !model.cancel
        }),
        Property::sometimes("succeeds in spite of a cancel", |model: &Lifecycle, system: &System| {
            let cancelled = ended(system, State::Succeeded) && system.record().cancel.is_some();
            cancelled || !model.cancel
        }),
    ]
}
