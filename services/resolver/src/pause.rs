//! Registries that want not to be asked for a while: told by a 429 or 503, they are left alone by this whole process, and
//! by the other replicas, which find the pause in the bucket that all share.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kiln_registry::{Error, Problem};
use tokio::time::Instant;

/// Where the registry doesn't say how long: doubled each time it says no again.
const FIRST: Duration = Duration::from_secs(1);
const LONGEST_BACK_OFF: Duration = Duration::from_secs(60);
/// A Retry-After beyond this is taken for a mistake: the registry is asked once more after it.
const LONGEST: Duration = Duration::from_secs(60 * 60);
/// So long after its end, a pause is forgotten: the next one begins short again.
const REMEMBERED: Duration = Duration::from_secs(5 * 60);

#[derive(Default)]
pub(crate) struct Pauses {
    by_registry: Mutex<HashMap<String, Pause>>,
}

struct Pause {
    until: Instant,
    back_off: Duration,
    limited: bool,
}

/// What is left of a pause.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Left {
    pub(crate) time: Duration,
    /// The registry counts requests (429); else it was unavailable (503).
    pub(crate) limited: bool,
}

impl Pauses {
    /// What is left of this registry's pause; `None` if it may be asked.
    pub(crate) fn left(&self, registry: &str) -> Option<Left> {
        let pauses = self.lock();
        let pause = pauses.get(registry)?;
        let time = pause.until.checked_duration_since(Instant::now()).filter(|time| !time.is_zero())?;
        Some(Left { time, limited: pause.limited })
    }

    /// Of a pause that another replica was asked for, until then.
    pub(crate) fn hear(&self, registry: &str, left: Left) {
        let until = Instant::now() + left.time.min(LONGEST);
        let mut pauses = self.lock();
        let known = pauses.get(registry);
        if known.is_none_or(|known| known.until < until) {
            let back_off = known.map_or(FIRST, |known| known.back_off);
            pauses.insert(registry.to_owned(), Pause { until, back_off, limited: left.limited });
        }
    }

    /// Learns from a registry's answer. True if a pause begins by it.
    pub(crate) fn learn<T>(&self, registry: &str, answer: &Result<T, Error>) -> bool {
        let (limited, retry_after) = match answer {
            Err(Error::Limited { retry_after, .. }) => (true, *retry_after),
            Err(Error::Unavailable { problem: Problem::Status(503), retry_after, .. }) => {
                (false, *retry_after)
            }
            // It answers: the next pause begins short again.
            Ok(_) => {
                self.forget(registry);
                return false;
            }
            Err(_) => return false,
        };
        let now = Instant::now();
        let mut pauses = self.lock();
        pauses.retain(|_, pause| pause.until + REMEMBERED > now);
        let before = pauses.get(registry);
        let paused_already = before.is_some_and(|pause| pause.until > now);
        // Several that were under way hear the same no: it counts once.
        let back_off = match before {
            Some(pause) if paused_already => pause.back_off,
            Some(pause) => (pause.back_off * 2).min(LONGEST_BACK_OFF),
            None => FIRST,
        };
        let until = now + retry_after.map_or(back_off, |said| said.min(LONGEST));
        let until = before.map_or(until, |pause| pause.until.max(until));
        pauses.insert(registry.to_owned(), Pause { until, back_off, limited });
        !paused_already
    }

    /// Ends no pause that runs: the answer may be one to a question from before it.
    fn forget(&self, registry: &str) {
        let mut pauses = self.lock();
        if pauses.get(registry).is_some_and(|pause| pause.until <= Instant::now()) {
            pauses.remove(registry);
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Pause>> {
        // No code panics while it holds the lock.
        self.by_registry.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limited(retry_after: Option<u64>) -> Result<(), Error> {
        Err(Error::Limited { registry: "r".into(), retry_after: retry_after.map(Duration::from_secs) })
    }

    fn left(pauses: &Pauses) -> Option<u64> {
        pauses.left("r").map(|left| left.time.as_secs())
    }

    #[tokio::test(start_paused = true)]
    async fn as_long_as_it_says_and_for_it_alone() {
        let pauses = Pauses::default();
        assert!(pauses.learn("r", &limited(Some(30))));
        assert!(!pauses.learn("r", &limited(Some(5))), "the same pause");
        assert_eq!(pauses.left("r"), Some(Left { time: Duration::from_secs(30), limited: true }));
        assert_eq!(pauses.left("other"), None);
        assert!(!pauses.learn("r", &Ok(())), "an answer from before");
        assert_eq!(left(&pauses), Some(30));
        tokio::time::advance(Duration::from_secs(30)).await;
        assert_eq!(left(&pauses), None);
        pauses.learn("r", &limited(Some(1_000_000)));
        assert_eq!(left(&pauses), Some(3600));
    }

    #[tokio::test(start_paused = true)]
    async fn the_back_off_doubles_until_it_answers() {
        let pauses = Pauses::default();
        for expected in [1, 2, 4, 8, 16, 32, 60, 60] {
            pauses.learn("r", &limited(None));
            pauses.learn("r", &limited(None));
            assert_eq!(left(&pauses), Some(expected));
            tokio::time::advance(Duration::from_secs(expected)).await;
        }
        pauses.learn("r", &Ok(()));
        let unavailable: Result<(), _> = Err(Error::Unavailable {
            registry: "r".into(),
            problem: Problem::Status(503),
            retry_after: None,
        });
        assert!(pauses.learn("r", &unavailable));
        assert_eq!(pauses.left("r"), Some(Left { time: Duration::from_secs(1), limited: false }));
        let refused: Result<(), _> =
            Err(Error::Unavailable { registry: "q".into(), problem: Problem::Refused, retry_after: None });
        assert!(!pauses.learn("q", &refused));
    }
}
