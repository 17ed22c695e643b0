//! The second model: a build's log, from its runs' output to the complete marker, among two relays.

use std::hash::{Hash, Hasher};

use stateright::{Model, Property};

use super::faults::{Fault, Faults};
use super::holder::Answer;
use super::relay::{Phase, Relay, mask, step};
use super::rules::Rules;

/// What the masker hides: it may be cut by a read, a chunk, or the end of a run.
pub(super) const SECRET: &[u8] = b"ST";
/// What the attempts' builders write, if they live that long.
const OUTPUT: [&[u8]; 2] = [b"aST", b"ST"];

pub(super) struct Log {
    pub(super) rules: Rules,
    pub(super) faults: Faults,
}

#[derive(Clone, Debug, PartialEq)]
pub(super) struct System {
    pub(super) source: Source,
    pub(super) relays: [Relay; 2],
    /// The last message of the log.
    pub(super) last: Message,
    /// All its chunks.
    pub(super) text: Vec<u8>,
    /// An append whose author was told that it failed, with the sequence that it expects.
    pub(super) on_its_way: Option<(u8, Message)>,
    /// A cursor that is kept apart from the chunks.
    pub(super) saved: Cursor,
    pub(super) faults: Faults,
    /// A message followed the complete marker, or does not lie where it says.
    pub(super) astray: bool,
    pub(super) taken_over: bool,
}

/// The build as its relays see it.
#[derive(Clone, Debug, PartialEq, Hash)]
pub(super) struct Source {
    /// The present attempt, from 0.
    pub(super) attempt: u8,
    pub(super) terminal: bool,
    /// Bytes written, and whether the run has ended, by attempt.
    written: [u8; 2],
    ended: [bool; 2],
    /// The output was cleaned up.
    removed: bool,
}

/// Where in the runs' raw output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Cursor {
    pub(super) attempt: u8,
    pub(super) position: u8,
}

/// A message of the log.
#[derive(Clone, Debug, PartialEq, Hash)]
pub(super) struct Message {
    pub(super) sequence: u8,
    pub(super) writer: u8,
    /// Of the first raw byte whose masked form isn't stored.
    pub(super) cursor: Cursor,
    /// The offset of its first byte and its length, in sum.
    pub(super) end: u8,
    pub(super) complete: bool,
    pub(super) text: Vec<u8>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// The relay's next step; it gets at most so many bytes.
    Step(usize, usize, Answer),
    Crash(usize),
    Lapse(usize),
    Notice(usize),
    Arrive,
    /// The builder writes a byte.
    Write,
    /// The run ends, wherever it is.
    End,
    Retry,
    Terminal,
    /// Clean-up of the output.
    Remove,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) struct WrongLastSequence;

impl Hash for System {
    /// Only what can still make a difference: of a sequence, whether it is the last; of a writer, whether it lives.
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        let writer =
            |message: &Message| self.relays.iter().position(|relay| relay.instance() == message.writer);
        let summary = |message: &Message| {
            let Message { cursor, end, complete, text, .. } = message.clone();
            (writer(message), cursor, end, complete, text)
        };
        summary(&self.last).hash(hasher);
        for relay in &self.relays {
            (relay.lease, relay.phase.place().map(|place| place.summary(self.last.sequence))).hash(hasher);
            (std::mem::discriminant(&relay.phase), relay.phase.message().map(summary)).hash(hasher);
        }
        if let Some((sequence, message)) = &self.on_its_way {
            (*sequence == self.last.sequence, summary(message)).hash(hasher);
        }
        (&self.source, &self.text, self.saved, self.faults, self.astray, self.taken_over).hash(hasher);
        (self.last.sequence == 0).hash(hasher);
    }
}

impl Source {
    /// What can be read of an attempt's output.
    pub(super) fn output(&self, attempt: u8) -> &[u8] {
        if self.removed { &[] } else { self.raw(attempt) }
    }

    /// Nothing follows in it.
    pub(super) fn has_ended(&self, attempt: u8) -> bool {
        self.ended.get(usize::from(attempt)).copied().unwrap_or_default()
    }

    fn raw(&self, attempt: u8) -> &[u8] {
        let attempt = usize::from(attempt);
        let written = self.written.get(attempt).map_or(0, |written| usize::from(*written));
        OUTPUT.get(attempt).and_then(|output| output.get(..written)).unwrap_or_default()
    }

    /// What the log is to be, as far as that is known by now.
    fn masked(&self) -> Vec<u8> {
        let parts = (0..=self.attempt).map(|attempt| mask(self.raw(attempt), self.has_ended(attempt)).0);
        parts.collect::<Vec<_>>().join(&b'|')
    }
}

impl System {
    pub(super) fn append(
        &mut self,
        rules: &Rules,
        expected: u8,
        message: &Message,
    ) -> Result<(), WrongLastSequence> {
        if rules.writer_cas && expected != self.last.sequence {
            return Err(WrongLastSequence);
        }
        self.text.extend(&message.text);
        self.astray |= self.last.complete || self.text.len() != usize::from(message.end);
        self.taken_over |= self.last.sequence > 0 && self.last.writer != message.writer;
        self.last = Message { sequence: self.last.sequence + 1, text: vec![], ..message.clone() };
        Ok(())
    }

    fn perform(&mut self, rules: &Rules, action: Action) -> Option<()> {
        let attempt = usize::from(self.source.attempt);
        let ended = self.source.has_ended(self.source.attempt);
        let untouched = self.is_untouched();
        let written = self.source.written.get_mut(attempt)?;
        match action {
            // The relays are alike: that the first one begins stands for both.
            Action::Step(1, ..) if untouched => return None,
            Action::Step(me, bytes, answer) => return step(self, rules, me, bytes, answer),
            Action::Crash(me) => {
                let relay = self.relays.get_mut(me)?;
                if relay.phase == Phase::Idle {
                    return None;
                }
                *relay = Relay::new(relay.index, relay.life + 1);
                return self.faults.suffer(Fault::Crash);
            }
            Action::Lapse(me) => {
                let relay = self.relays.get_mut(me)?;
                if relay.phase == Phase::Idle || !relay.lease {
                    return None;
                }
                relay.lease = false;
                return self.faults.suffer(Fault::Lapse);
            }
            Action::Notice(me) => {
                let relay = self.relays.get_mut(me)?;
                if relay.lease {
                    return None;
                }
                *relay = Relay::new(relay.index, relay.life + 1);
            }
            Action::Arrive => {
                let (expected, message) = self.on_its_way.take()?;
                let _arrived_too_late = self.append(rules, expected, &message);
            }
            Action::Write if !ended && usize::from(*written) < OUTPUT.get(attempt)?.len() => *written += 1,
            Action::End if !ended => *self.source.ended.get_mut(attempt)? = true,
            Action::Retry if ended && attempt == 0 && !self.source.terminal => self.source.attempt = 1,
            // Also of a run that never began.
            Action::Terminal if (ended || *written == 0) && !self.source.terminal => {
                self.source.terminal = true;
                *self.source.ended.get_mut(attempt)? = true;
            }
            Action::Remove if self.source.terminal && !self.source.removed => {
                if rules.output_kept_until_complete && !self.last.complete {
                    return None;
                }
                self.source.removed = true;
            }
            Action::Write | Action::End | Action::Retry | Action::Terminal | Action::Remove => return None,
        }
        Some(())
    }

    /// Nobody has tried to claim it.
    fn is_untouched(&self) -> bool {
        let claimed = self.last.sequence > 0;
        !claimed && self.on_its_way.is_none() && self.relays.iter().all(|relay| relay.phase == Phase::Idle)
    }
}

impl Model for Log {
    type State = System;
    type Action = Action;

    fn init_states(&self) -> Vec<System> {
        let start = Cursor { attempt: 0, position: 0 };
        let nobody = u8::MAX;
        vec![System {
            source: Source {
                attempt: 0,
                terminal: false,
                written: [0; 2],
                ended: [false; 2],
                removed: false,
            },
            relays: [Relay::new(0, 0), Relay::new(1, 0)],
            last: Message {
                sequence: 0,
                writer: nobody,
                cursor: start,
                end: 0,
                complete: false,
                text: vec![],
            },
            text: vec![],
            on_its_way: None,
            saved: start,
            faults: self.faults,
            astray: false,
            taken_over: false,
        }]
    }

    fn actions(&self, _: &System, actions: &mut Vec<Action>) {
        actions.extend([Action::Arrive, Action::Write, Action::End, Action::Retry, Action::Terminal]);
        actions.push(Action::Remove);
        for me in 0..2 {
            for answer in [Answer::Usual, Answer::LostAfter, Answer::LostBefore] {
                actions.extend([1, 3].map(|bytes| Action::Step(me, bytes, answer)));
            }
            actions.extend([Action::Crash(me), Action::Lapse(me), Action::Notice(me)]);
        }
    }

    fn next_state(&self, system: &System, action: Action) -> Option<System> {
        let mut next = system.clone();
        next.perform(&self.rules, action)?;
        let last = next.last.sequence;
        next.on_its_way.take_if(|(expected, _)| self.rules.writer_cas && *expected != last);
        Some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("an exact prefix", |_, system: &System| {
                system.source.masked().starts_with(&system.text) && !system.astray
            }),
            Property::always("complete is whole", |_, system: &System| {
                let whole = system.source.terminal && system.text == system.source.masked();
                whole || !system.last.complete
            }),
            Property::eventually("the log is complete", |_, system: &System| system.last.complete),
            Property::sometimes("taken over, two attempts, secrets masked", |_, system: &System| {
                system.last.complete && system.taken_over && system.text == b"a*|*"
            }),
            Property::sometimes("half a secret, at a run's end", |_, system: &System| {
                system.last.complete && system.text == b"aS|"
            }),
            Property::sometimes("empty, of a build that never started", |_, system: &System| {
                system.last.complete && system.text.is_empty()
            }),
        ]
    }
}
