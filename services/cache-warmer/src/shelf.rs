//! What is known of each image that is kept warm: what `kiln refs` lists.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kiln_contract::cache_warmer::{WarmImage, WarmList};
use tokio::time::Instant;

use crate::used::Use;

/// One image that is kept warm.
#[derive(Clone, Debug, Default)]
pub(crate) struct Kept {
    /// Its place in the configured list, if it stands there.
    pub(crate) configured: Option<usize>,
    /// Its place among the images that builds used, and what they made of it.
    pub(crate) used: Option<(usize, Use)>,
    answer: Option<Answer>,
    trouble: String,
}

#[derive(Clone, Debug)]
struct Answer {
    resolved: String,
    said_at: Instant,
}

/// All of them, by reference; clones share it.
#[derive(Clone, Default)]
pub(crate) struct Shelf(Arc<Mutex<BTreeMap<String, Kept>>>);

impl Shelf {
    /// Makes these the images that are kept warm. What is known of those that stay is kept.
    pub(crate) fn hold(&self, mut wanted: BTreeMap<String, Kept>) {
        let mut held = self.lock();
        for (reference, kept) in &mut wanted {
            if let Some(known) = held.remove(reference) {
                (kept.answer, kept.trouble) = (known.answer, known.trouble);
            }
        }
        *held = wanted;
    }

    pub(crate) fn answered(&self, reference: &str, resolved: String, age: Duration) {
        if let Some(kept) = self.lock().get_mut(reference) {
            let said_at = Instant::now().checked_sub(age).unwrap_or_else(Instant::now);
            kept.answer = Some(Answer { resolved, said_at });
        }
    }

    /// Notes what keeps an image from being warm; empty for nothing.
    pub(crate) fn trouble(&self, reference: &str, trouble: &str) {
        if let Some(kept) = self.lock().get_mut(reference) {
            trouble.clone_into(&mut kept.trouble);
        }
    }

    /// How old the answer for an image is, if there ever was one.
    pub(crate) fn age(&self, reference: &str) -> Option<Duration> {
        Some(self.lock().get(reference)?.answer.as_ref()?.said_at.elapsed())
    }

    /// The configured ones first, as they are listed, then the others, the most used first.
    pub(crate) fn list(&self) -> WarmList {
        let held = self.lock();
        let mut images: Vec<_> = held.iter().collect();
        let place = |place: Option<usize>| place.unwrap_or(usize::MAX);
        images.sort_by_key(|(_, kept)| (place(kept.configured), place(kept.used.map(|(place, _)| place))));
        WarmList { images: images.into_iter().map(|(reference, kept)| kept.shown(reference)).collect() }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Kept>> {
        // No code panics while it holds the lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kept {
    fn shown(&self, reference: &str) -> WarmImage {
        let age = self.answer.as_ref().map(|answer| answer.said_at.elapsed()).unwrap_or_default();
        WarmImage {
            reference: reference.to_owned(),
            resolved: self.answer.as_ref().map(|answer| answer.resolved.clone()).unwrap_or_default(),
            age_ms: u64::try_from(age.as_millis()).unwrap_or(u64::MAX),
            configured: self.configured.is_some(),
            builds: self.used.map_or(0, |(_, used)| used.builds),
            last_used_ms: self.used.map_or(0, |(_, used)| used.last.as_millisecond()),
            trouble: self.trouble.clone(),
        }
    }
}
