//! Troubles of the bus that another part of the process meets than its keeper: the keeper tells them with its own.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use prometheus_client::encoding::EncodeLabelSet;

use crate::connection::Bus;

/// What is in trouble, and how: one alarm.
#[derive(Clone, Debug, Hash, PartialEq, Eq, PartialOrd, Ord, EncodeLabelSet)]
pub(crate) struct Trouble {
    /// The stream's name (of a bucket, its stream's), or `bus`.
    pub(crate) part: String,
    pub(crate) what: &'static str,
}

/// What was met since the keeper looked last, and what lasts.
#[derive(Debug, Default)]
pub(crate) struct Met {
    troubles: Mutex<BTreeMap<Trouble, Sentence>>,
}

#[derive(Debug)]
struct Sentence {
    why: String,
    lasts: bool,
}

impl Met {
    /// What is to be told now. What happened is taken; what lasts stays.
    pub(crate) fn take(&self) -> BTreeMap<Trouble, String> {
        let mut troubles = self.troubles.lock().unwrap_or_else(PoisonError::into_inner);
        let told = troubles.iter().map(|(trouble, sentence)| (trouble.clone(), sentence.why.clone()));
        let told = told.collect();
        troubles.retain(|_, sentence| sentence.lasts);
        told
    }
}

impl Bus {
    /// Something happened to a part of the bus, and was put right.
    pub(crate) fn happened(&self, part: impl Into<String>, what: &'static str, why: impl Into<String>) {
        self.meet(part.into(), what, Some(Sentence { why: why.into(), lasts: false }));
    }

    /// A part of the bus is in trouble for as long as there is a sentence that says so.
    pub fn trouble(&self, part: impl Into<String>, what: &'static str, why: Option<String>) {
        self.meet(part.into(), what, why.map(|why| Sentence { why, lasts: true }));
    }

    fn meet(&self, part: String, what: &'static str, sentence: Option<Sentence>) {
        let mut troubles = self.met.troubles.lock().unwrap_or_else(PoisonError::into_inner);
        let trouble = Trouble { part, what };
        match sentence {
            Some(sentence) => drop(troubles.insert(trouble, sentence)),
            None => drop(troubles.remove(&trouble)),
        }
    }
}
