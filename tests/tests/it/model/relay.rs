//! A log-relay's algorithm: "Logs" of the design, one outside act a step.

use super::faults::Fault;
use super::holder::Answer;
use super::log::{Cursor, Message, SECRET, System};
use super::rules::Rules;

/// A process that may write the log.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Relay {
    pub(super) index: u8,
    pub(super) life: u8,
    pub(super) lease: bool,
    pub(super) phase: Phase,
}

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Phase {
    Idle,
    /// It is the writer, as far as it knows.
    Read(Place),
    Append(Place, Message),
    /// The append's answer was lost, or says that something else is there: read the last message back.
    Unsure(Place, Message),
    /// The design turned round: the cursor is kept apart from the chunks, and written after them.
    SaveCursor(Place),
}

/// Where a writer is.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Place {
    /// Of the log's last message, as far as it knows: every append expects it.
    sequence: u8,
    /// Bytes of masked log before its next chunk.
    offset: u8,
    /// The next raw byte that it reads.
    cursor: Cursor,
    /// Raw bytes that it has read and can't mask yet.
    held: Vec<u8>,
}

impl Relay {
    pub(super) fn new(index: u8, life: u8) -> Self {
        Self { index, life, lease: true, phase: Phase::Idle }
    }

    pub(super) fn instance(&self) -> u8 {
        self.index * 16 + self.life
    }
}

/// The next step of relay `me`, which gets at most `bytes` of the source; none where it waits.
pub(super) fn step(
    system: &mut System,
    rules: &Rules,
    me: usize,
    bytes: usize,
    answer: Answer,
) -> Option<()> {
    let relay = system.relays.get(me)?.clone();
    let instance = relay.instance();
    match answer {
        Answer::Usual => {}
        Answer::LostAfter | Answer::LostBefore if matches!(relay.phase, Phase::Append(..)) => {
            system.faults.suffer(Fault::LostAck)?;
        }
        _ => return None,
    }
    let next = match relay.phase {
        Phase::Idle => {
            let last = system.last.clone();
            let writes = |other: &Relay| other.lease && other.instance() == last.writer;
            if last.complete || !relay.lease || system.relays.iter().any(writes) {
                return None;
            }
            // The last message says where to go on.
            let cursor = if rules.source_cursor_with_chunk { last.cursor } else { system.saved };
            let place = Place { sequence: last.sequence, offset: last.end, cursor, held: vec![] };
            let claim = Message { writer: instance, cursor, text: vec![], ..last };
            Phase::Append(place, claim)
        }
        Phase::Read(place) => read(system, rules, instance, place, bytes)?,
        Phase::Append(place, message) => {
            if answer == Answer::LostBefore {
                if system.on_its_way.is_some() {
                    return None;
                }
                system.on_its_way = Some((place.sequence, message.clone()));
                Phase::Unsure(place, message)
            } else {
                let appended = system.append(rules, place.sequence, &message);
                match answer {
                    Answer::LostAfter if appended.is_err() => return None,
                    Answer::LostAfter => Phase::Unsure(place, message),
                    // Another wrote, or its own first try has arrived since.
                    _ if appended.is_err() => Phase::Unsure(place, message),
                    _ => place.after(rules, &message, system.last.sequence),
                }
            }
        }
        Phase::Unsure(place, message) => {
            let last = &system.last;
            let same = Message { text: vec![], sequence: last.sequence, ..message.clone() } == *last;
            if last.sequence == place.sequence {
                Phase::Append(place, message)
            } else if same {
                place.after(rules, &message, last.sequence)
            } else {
                Phase::Idle
            }
        }
        Phase::SaveCursor(place) => {
            system.saved = place.cursor;
            Phase::Read(place)
        }
    };
    system.relays.get_mut(me)?.phase = next;
    Some(())
}

/// Reads some of the source, masks it, and cuts a chunk where masking may begin anew.
fn read(system: &System, rules: &Rules, me: u8, place: Place, bytes: usize) -> Option<Phase> {
    let Cursor { attempt, position } = place.cursor;
    let source = &system.source;
    let output = source.output(attempt);
    let there = output.get(usize::from(position)..).unwrap_or_default();
    let new = there.get(..bytes.min(there.len()))?;
    let end = new.len() == there.len() && source.has_ended(attempt);
    let over = end && source.terminal && source.attempt == attempt;
    let goes_on = end && source.attempt > attempt;
    if new.is_empty() && !end || (bytes > 1 && there.len() < 2) {
        return None;
    }
    let raw = [place.held.as_slice(), new].concat();
    let (mut text, held) = mask(&raw, end);
    let mut cursor = Cursor { attempt, position: position + u8::try_from(new.len()).ok()? };
    let mut next = Place { cursor, held, ..place.clone() };
    if goes_on {
        // The line that says so goes with the cursor that it belongs to, so it is there once.
        text.push(b'|');
        cursor = Cursor { attempt: attempt + 1, position: 0 };
        next.cursor = cursor;
    } else if rules.cursor_behind_masker {
        cursor.position -= u8::try_from(next.held.len()).ok()?;
    }
    if text.is_empty() && !over {
        return (next != place).then_some(Phase::Read(next));
    }
    let message = Message {
        sequence: 0,
        writer: me,
        cursor,
        end: place.offset + u8::try_from(text.len()).ok()?,
        complete: over,
        text,
    };
    Some(Phase::Append(next, message))
}

impl Phase {
    pub(super) fn place(&self) -> Option<&Place> {
        match self {
            Self::Idle => None,
            Self::Read(place) | Self::SaveCursor(place) => Some(place),
            Self::Append(place, _) | Self::Unsure(place, _) => Some(place),
        }
    }

    pub(super) fn message(&self) -> Option<&Message> {
        match self {
            Self::Append(_, message) | Self::Unsure(_, message) => Some(message),
            Self::Idle | Self::Read(_) | Self::SaveCursor(_) => None,
        }
    }
}

impl Place {
    /// What can make a difference in it.
    pub(super) fn summary(&self, last: u8) -> (bool, u8, Cursor, &[u8]) {
        (self.sequence == last, self.offset, self.cursor, &self.held)
    }

    /// The message is stored, at `sequence`.
    fn after(self, rules: &Rules, message: &Message, sequence: u8) -> Phase {
        let place = Self { sequence, offset: message.end, ..self };
        match message.complete {
            true => Phase::Idle,
            false if rules.source_cursor_with_chunk => Phase::Read(place),
            false => Phase::SaveCursor(place),
        }
    }
}

/// The text with each secret masked, and the rest that may be the beginning of one; none where nothing follows.
pub(super) fn mask(raw: &[u8], end: bool) -> (Vec<u8>, Vec<u8>) {
    let (mut text, mut rest) = (vec![], raw);
    while let Some((first, others)) = rest.split_first() {
        if let Some(after) = rest.strip_prefix(SECRET) {
            text.push(b'*');
            rest = after;
        } else if SECRET.starts_with(rest) && !end {
            break;
        } else {
            text.push(*first);
            rest = others;
        }
    }
    (text, rest.to_vec())
}
