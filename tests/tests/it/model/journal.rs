//! The journal of one build: appends that name the sequence they expect, judged by `kiln_domain`'s own rules.

use std::sync::Arc;

use kiln_domain::engine::Handle;
use kiln_domain::failure::{Failure, FailureReason};
use kiln_domain::id::{BuildId, ImageKey, InstanceId};
use kiln_domain::record::Record;
use kiln_domain::reference::Digest;
use kiln_domain::run::Findings;
use kiln_domain::source::Source;
use kiln_domain::transition::{Change, apply};

use super::rules::Rules;

/// An image at the target tag. Every builder process makes its own, unless builds are reproducible.
pub(super) type Image = u8;

/// What was at the target before the build.
pub(super) const BEFORE: Image = 0;

pub(super) fn digest(image: Image) -> Digest {
    Digest::of(&[image])
}

/// One event of the journal: its sequence, and the record that it carries.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Entry {
    pub(super) sequence: u8,
    pub(super) record: Arc<Record>,
}

/// What an append says, in the model's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Act {
    Claimed,
    Started,
    CancelRequested,
    Released,
    Retrying,
    Succeeded(Image),
    Failed(FailureReason),
    Cancelled,
}

/// An append on its way: what its author had read, and what it says.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Append {
    pub(super) after: Entry,
    /// The holder; absent for whoever is asked.
    pub(super) by: Option<InstanceId>,
    pub(super) act: Act,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) struct WrongLastSequence;

#[derive(Clone, Debug, PartialEq)]
pub(super) struct Journal {
    pub(super) last: Entry,
    /// How many terminal events it holds.
    pub(super) ends: u8,
    /// Somebody appended, at the right sequence, what the rules forbid.
    pub(super) illegal: bool,
}

impl Journal {
    /// The journal of a build that was just accepted.
    pub(super) fn queued() -> Self {
        let record = Arc::new(queued());
        Self { last: Entry { sequence: 1, record }, ends: 0, illegal: false }
    }

    /// It can only be refused, whenever it arrives.
    pub(super) fn is_too_late(&self, rules: &Rules, append: &Append) -> bool {
        append.after.sequence != self.last.sequence && rules.checks(append.change().event())
    }

    pub(super) fn append(&mut self, rules: &Rules, append: &Append) -> Result<(), WrongLastSequence> {
        if self.is_too_late(rules, append) {
            return Err(WrongLastSequence);
        }
        let change = append.change();
        // The author computes the record from what it read; the bus compares sequences and nothing else.
        match apply(Some(&append.after.record), &change) {
            Ok(record) => {
                self.ends += u8::from(record.state.is_terminal());
                self.last = Entry { sequence: self.last.sequence + 1, record: Arc::new(record) };
            }
            Err(_) => self.illegal = true,
        }
        Ok(())
    }
}

impl Append {
    fn change(&self) -> Change {
        let findings = Findings::default();
        match (self.act, self.by.clone()) {
            (Act::CancelRequested, _) => Change::CancelRequested { reason: String::new() },
            (Act::Cancelled, by) => Change::Cancelled { by, findings },
            (Act::Failed(reason), by) => Change::Failed { by, failure: Failure::new(reason, "-"), findings },
            (Act::Claimed, Some(by)) => Change::Claimed { by },
            (Act::Started, Some(by)) => {
                let handle = Handle::new(self.after.record.run().as_str());
                Change::Started { by, handle, engine: "local".into(), build_tool: String::new() }
            }
            (Act::Released, Some(by)) => Change::Released { by, why: None },
            (Act::Retrying, Some(by)) => Change::Retrying { by, why: String::new() },
            (Act::Succeeded(image), Some(by)) => Change::Succeeded { by, digest: digest(image), findings },
            (act, None) => unreachable!("{act:?} is for holders"),
        }
    }
}

fn queued() -> Record {
    let id = BuildId::new(&ImageKey::of("r/t:x"), [1; 10]);
    let source = Source::Image("r/s:1".parse().expect("a reference"));
    let queued = Record {
        base_exists: true,
        digest_before: Some(digest(BEFORE)),
        timeout_ms: 1,
        queue_limit_ms: 1,
        ..Record::accepted(id, "r/t:x".into(), "r/b:x".into(), source, "ann".into())
    };
    apply(None, &Change::Queued(Box::new(queued))).expect("a new build")
}
