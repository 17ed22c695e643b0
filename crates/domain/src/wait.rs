//! How a build waits for its builder: for how long at most, and how long before its start is tried again.
//!
//! All of it follows from the record, so that whoever comes to hold the build keeps to it.

use std::time::Duration;

use jiff::Timestamp;

use crate::failure::{Failure, FailureReason};
use crate::record::Record;

/// Before the second attempt; each later one waits four times as long.
const ATTEMPT_AGAIN: Duration = Duration::from_secs(1);
/// Before a start that an engine refused is tried by the next holder; doubled each time.
const START_AGAIN: Duration = Duration::from_secs(1);
/// The longest that it grows to.
const START_AGAIN_AT_MOST: Duration = Duration::from_secs(60);

impl Record {
    /// Whether its builder is still to be started: for the first time, or again after one was lost.
    pub fn waits_for_start(&self) -> bool {
        !self.state.is_terminal() && self.handle.is_none()
    }

    /// When the wait for its builder must be over. Each wait counts anew: the first from `queued`, the others from `retrying`.
    pub fn start_deadline(&self) -> Option<Timestamp> {
        let since = if self.attempt == 1 { self.queued_at } else { self.retried_at };
        later(since?, Duration::from_millis(self.queue_limit_ms))
    }

    /// Whether it waits for its builder, and has for longer than it may.
    pub fn has_waited_too_long(&self, now: Timestamp) -> bool {
        self.waits_for_start() && self.start_deadline().is_some_and(|deadline| deadline < now)
    }

    /// Before this time nobody starts its builder, because a former one was lost or could not be started.
    pub fn not_before(&self) -> Option<Timestamp> {
        let attempt = self.retried_at.filter(|_| self.attempt > 1);
        let attempt = attempt.and_then(|at| later(at, grown(ATTEMPT_AGAIN, 4, self.attempt - 1)));
        let start = self.released_at.filter(|_| self.refused_starts > 0);
        let start = start
            .and_then(|at| later(at, grown(START_AGAIN, 2, self.refused_starts).min(START_AGAIN_AT_MOST)));
        attempt.max(start)
    }

    /// Why a build that [`Record::has_waited_too_long`] fails: nobody had a slot for it, or what kept it from its start. That
    /// is the `complaint` of its holder's engine, if it has one, or what stands in the record.
    pub fn queue_expired(&self, complaint: Option<&str>) -> Failure {
        let message = match complaint.unwrap_or(&self.message) {
            "" => "nobody had a free slot for it in time".to_owned(),
            complaint => format!("it could not be started in time: {complaint}"),
        };
        Failure::new(FailureReason::QueueExpired, message)
    }
}

/// The `n`th of pauses that begin with `first`, each `by` times the one before.
fn grown(first: Duration, by: u32, n: u32) -> Duration {
    first.saturating_mul(by.saturating_pow(n.saturating_sub(1)))
}

fn later(at: Timestamp, by: Duration) -> Option<Timestamp> {
    at.checked_add(by).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::Handle;
    use crate::id::{BuildId, ImageKey, InstanceId};
    use crate::source::Source;
    use crate::transition::{Change, apply};

    const LIMIT: i64 = 600;

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(seconds).unwrap()
    }

    /// The record after these changes, each with the second in which it was stored.
    fn after(changes: &[(i64, &str)]) -> Record {
        let by = InstanceId::new("o", 1).unwrap();
        let queued = Record {
            queue_limit_ms: u64::try_from(LIMIT * 1000).unwrap(),
            ..Record::accepted(
                BuildId::new(&ImageKey::of("r/t:x"), [1; 10]),
                "r/t:x".into(),
                "r/b:x".into(),
                Source::Image("r/s:1".parse().unwrap()),
                "ann".into(),
            )
        };
        changes.iter().fold(queued.at("queued", at(0)), |before, (second, change)| {
            let by = by.clone();
            let change = match *change {
                "claimed" => Change::Claimed { by },
                "started" => Change::Started {
                    by,
                    handle: Handle::new("h"),
                    engine: "local".into(),
                    build_tool: String::new(),
                },
                "retrying" => Change::Retrying { by, why: "attempt 1 was lost".into() },
                "released" => Change::Released { by, why: None },
                why => Change::Released { by, why: Some(why.into()) },
            };
            apply(Some(&before), &change).unwrap().at(change.event(), at(*second))
        })
    }

    #[test]
    fn each_wait_has_its_own_limit_and_says_what_it_waited_for() {
        let refused = [(1, "claimed"), (3, "no room")];
        let started = [(1, "claimed"), (2, "started")];
        let retried = [(1, "claimed"), (2, "started"), (1000, "retrying")];
        let refused_again = [&retried[..], &[(1001, "no room")]].concat();
        let started_again = [&retried[..], &[(1001, "started")]].concat();
        for (changes, too_late, says) in [
            (&[][..], Some(LIMIT + 1), "nobody had a free slot for it in time"),
            (&refused, Some(LIMIT + 1), "it could not be started in time: no room"),
            (&started, None, ""),
            (&retried, Some(1000 + LIMIT + 1), "it could not be started in time: attempt 1 was lost"),
            (&refused_again, Some(1000 + LIMIT + 1), "it could not be started in time: no room"),
            (&started_again, None, ""),
        ] {
            let record = after(changes);
            let Some(too_late) = too_late else {
                assert!(!record.has_waited_too_long(at(i32::MAX.into())), "{changes:?}: it runs");
                continue;
            };
            assert!(!record.has_waited_too_long(at(too_late - 1)), "{changes:?}: its time is not up");
            assert!(record.has_waited_too_long(at(too_late)), "{changes:?}: its time is up");
            assert_eq!(record.queue_expired(None), Failure::new(FailureReason::QueueExpired, says));
        }
    }

    #[test]
    fn pauses_grow_to_a_bound_and_begin_anew_after_a_start() {
        let lost = [(1, "claimed"), (2, "started"), (10, "retrying")];
        let lost_again = [&lost[..], &[(11, "started"), (20, "retrying")]].concat();
        let refused = |times: i64| -> Vec<(i64, &str)> {
            (1..=times).flat_map(|n| [(n * 100, "claimed"), (n * 100, "no room")]).collect()
        };
        for (changes, not_before) in [
            (vec![], None),
            (lost.to_vec(), Some(11)),
            (lost_again, Some(24)),
            (refused(1), Some(101)),
            (refused(2), Some(202)),
            (refused(4), Some(408)),
            (refused(9), Some(960)),
            // It was let go of for another reason: whoever comes may try at once.
            ([refused(2), vec![(300, "claimed"), (300, "released")]].concat(), None),
            ([refused(2), vec![(300, "claimed"), (301, "started")]].concat(), None),
            // The longer of both.
            ([&lost[..], &[(10, "no room"), (11, "claimed"), (11, "no room")]].concat(), Some(13)),
        ] {
            assert_eq!(after(&changes).not_before(), not_before.map(at), "{changes:?}");
        }
    }
}
