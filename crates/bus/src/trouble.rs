//! Troubles of the bus that another part of the process meets than its keeper: the keeper tells them with its own.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use prometheus_client::encoding::EncodeLabelSet;

use crate::connection::Bus;

/// What is in trouble, and how: one alarm.
#[derive(Clone, Debug, Hash, PartialEq, Eq, PartialOrd, Ord, EncodeLabelSet)]
pub(crate) struct Trouble {
    /// The stream's name (of a bucket, its stream's), or `bus`.
    pub(crate) part: String,
    pub(crate) what: &'static str,
}

/// What was met since the keeper looked last, and what lasts. Clones share it: all connections of a process have one.
#[derive(Clone, Debug, Default)]
pub struct Troubles {
    met: Arc<Mutex<BTreeMap<Trouble, Sentence>>>,
}

#[derive(Debug)]
struct Sentence {
    why: String,
    lasts: bool,
}

impl Troubles {
    /// What is to be told now. What happened is taken; what lasts stays.
    pub(crate) fn take(&self) -> BTreeMap<Trouble, String> {
        let mut troubles = self.met();
        let told = troubles.iter().map(|(trouble, sentence)| (trouble.clone(), sentence.why.clone()));
        let told = told.collect();
        troubles.retain(|_, sentence| sentence.lasts);
        told
    }

    /// Whole after each change, whoever panicked with it.
    fn met(&self) -> MutexGuard<'_, BTreeMap<Trouble, Sentence>> {
        self.met.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Bus {
    /// The same connection, whose troubles are told by the keeper that shares `troubles`; else it is one of this bus's own.
    pub fn with_troubles(mut self, troubles: &Troubles) -> Self {
        self.troubles = troubles.clone();
        self
    }

    /// Something happened to a part of the bus, and was put right.
    pub(crate) fn happened(&self, part: impl Into<String>, what: &'static str, why: impl Into<String>) {
        self.meet(part.into(), what, Some(Sentence { why: why.into(), lasts: false }));
    }

    /// A part of the bus is in trouble for as long as there is a sentence that says so.
    pub(crate) fn trouble(&self, part: impl Into<String>, what: &'static str, why: Option<String>) {
        self.meet(part.into(), what, why.map(|why| Sentence { why, lasts: true }));
    }

    fn meet(&self, part: String, what: &'static str, sentence: Option<Sentence>) {
        let mut troubles = self.troubles.met();
        let trouble = Trouble { part, what };
        match sentence {
            Some(sentence) => drop(troubles.insert(trouble, sentence)),
            None => drop(troubles.remove(&trouble)),
        }
    }
}
