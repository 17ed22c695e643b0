//! Times and how they are shown.

use std::time::Duration;

use jiff::Timestamp;
use kiln_proto::kiln_v1::Build;

/// The one place of the command line that reads the clock.
#[expect(clippy::disallowed_methods, reason = "ages are shown against the clock of whoever looks")]
pub(super) fn now() -> Timestamp {
    Timestamp::now()
}

/// A time of the API; none if it isn't set or out of range.
pub(super) fn timestamp(seconds: i64, nanos: i32) -> Option<Timestamp> {
    Timestamp::new(seconds, nanos).ok()
}

/// From `start` to `end`; zero where clocks disagree.
pub(super) fn between(start: Timestamp, end: Timestamp) -> Duration {
    end.duration_since(start).try_into().unwrap_or_default()
}

pub(super) fn queued_at(build: &Build) -> Option<Timestamp> {
    build.queued_at.as_ref().and_then(|at| timestamp(at.seconds, at.nanos))
}

pub(super) fn started_at(build: &Build) -> Option<Timestamp> {
    build.started_at.as_ref().and_then(|at| timestamp(at.seconds, at.nanos))
}

pub(super) fn finished_at(build: &Build) -> Option<Timestamp> {
    build.finished_at.as_ref().and_then(|at| timestamp(at.seconds, at.nanos))
}

/// How long a build has run, until `now` if it still does; one that never started: none.
pub(super) fn run_time(build: &Build, now: Timestamp) -> Option<Duration> {
    started_at(build).map(|start| between(start, finished_at(build).unwrap_or(now)))
}

/// `0.4s`, `42s`, `3m05s`, `2h05m`, `3d04h`: about three digits, whatever the size.
pub(super) fn duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match seconds {
        0..10 => format!("{seconds}.{}s", duration.subsec_millis() / 100),
        10..60 => format!("{seconds}s"),
        60..3_600 => format!("{}m{:02}s", seconds / 60, seconds % 60),
        3_600..86_400 => format!("{}h{:02}m", seconds / 3_600, seconds / 60 % 60),
        _ => format!("{}d{:02}h", seconds / 86_400, seconds / 3_600 % 24),
    }
}

/// `42s`, `3m`, `2h`, `5d`: one unit, for a column of ages.
pub(super) fn age(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3_600 => format!("{}m", seconds / 60),
        3_600..86_400 => format!("{}h", seconds / 3_600),
        _ => format!("{}d", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_and_ages() {
        for (ms, long, short) in [
            (0, "0.0s", "0s"),
            (449, "0.4s", "0s"),
            (9_999, "9.9s", "9s"),
            (10_000, "10s", "10s"),
            (59_999, "59s", "59s"),
            (60_000, "1m00s", "1m"),
            (185_000, "3m05s", "3m"),
            (3_599_000, "59m59s", "59m"),
            (7_500_000, "2h05m", "2h"),
            (86_400_000, "1d00h", "1d"),
            (273_600_000, "3d04h", "3d"),
        ] {
            let time = Duration::from_millis(ms);
            assert_eq!((duration(time).as_str(), age(time).as_str()), (long, short), "{ms}");
        }
    }

    #[test]
    fn clocks_that_disagree_make_no_negative_time() {
        let (early, late) = (Timestamp::UNIX_EPOCH, timestamp(5, 500_000_000).unwrap());
        assert_eq!(between(early, late), Duration::from_millis(5_500));
        assert_eq!(between(late, early), Duration::ZERO);
        assert_eq!(timestamp(i64::MAX, 0), None);
    }
}
