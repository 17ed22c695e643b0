//! Every subject and stream name of the bus. No other crate spells one.

use kiln_domain::id::{BuildId, ImageKey, InvalidId};

/// The builds' histories.
pub const JOURNAL_STREAM: &str = "KILN_BUILDS";
/// A mirror of the journal for other subscribers.
pub const EVENTS_STREAM: &str = "KILN_EVENTS";
/// The builds' logs.
pub const LOGS_STREAM: &str = "KILN_LOGS";
/// The running steps, one message a build, in memory.
pub const PROGRESS_STREAM: &str = "KILN_PROGRESS";
/// There for a moment, while it is examined whether the server has room.
pub const TRIAL_STREAM: &str = "KILN_TRIAL";

/// Every subject of the journal: `kiln.build.v1.<image key>.<build id>.<event>`.
pub const JOURNAL_SUBJECTS: &str = "kiln.build.v1.*.*.*";
/// Every event of a build that made its image.
pub const SUCCEEDED_SUBJECTS: &str = "kiln.build.v1.*.*.succeeded";
/// Every subject of the log stream: `kiln.log.v1.<build id>`.
pub const LOG_SUBJECTS: &str = "kiln.log.v1.*";
/// Where the log stream republishes each chunk once it is stored.
pub const LIVE_LOG_DESTINATION: &str = "kiln.live.v1.{{wildcard(1)}}";
/// Every subject of the progress stream: `kiln.progress.v1.<build id>`.
pub const PROGRESS_SUBJECTS: &str = "kiln.progress.v1.*";

/// A question that nobody answers: a bus that is alive says so at once.
pub const NOBODY: &str = "kiln.nobody.v1.alive";

/// One event of a build.
pub fn event(id: &BuildId, event: &str) -> String {
    format!("kiln.build.v1.{}.{id}.{event}", id.image_key())
}

/// Every event of every build of an image: literally the filter of each append's expected sequence.
pub fn image(key: &ImageKey) -> String {
    format!("kiln.build.v1.{key}.>")
}

/// Every event of one build.
pub fn build(id: &BuildId) -> String {
    format!("kiln.build.v1.{}.{id}.>", id.image_key())
}

/// The build and the event's name of a journal subject.
pub fn parse_event(subject: &str) -> Result<(BuildId, &str), InvalidId> {
    const WRONG: InvalidId =
        InvalidId { what: "journal subject", expected: "kiln.build.v1.<image key>.<build id>.<event>" };
    let mut tokens = subject.strip_prefix("kiln.build.v1.").ok_or(WRONG)?.split('.');
    let (Some(_key), Some(id), Some(event), None) =
        (tokens.next(), tokens.next(), tokens.next(), tokens.next())
    else {
        return Err(WRONG);
    };
    Ok((id.parse()?, event))
}

/// One build's log in the stream.
pub fn log(id: &BuildId) -> String {
    format!("kiln.log.v1.{id}")
}

/// One build's log as it is stored, live.
pub fn live_log(id: &BuildId) -> String {
    format!("kiln.live.v1.{id}")
}

/// One build's running step.
pub fn progress(id: &BuildId) -> String {
    format!("kiln.progress.v1.{id}")
}

/// The build of a log, live-log or progress subject.
pub fn parse_build_suffix(subject: &str) -> Result<BuildId, InvalidId> {
    subject.rsplit('.').next().unwrap_or_default().parse()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_subject_is_under_its_image_and_parses_back() {
        let id = BuildId::new(&ImageKey::of("r/x:y"), [7; 10]);
        let subject = event(&id, "queued");
        assert!(subject.starts_with(image(&id.image_key()).trim_end_matches('>')));
        assert_eq!(parse_event(&subject), Ok((id.clone(), "queued")));
        assert_eq!(parse_build_suffix(&log(&id)), Ok(id));
        for other in ["", "kiln.build.v1.a.b", "kiln.build.v1.a.b.c.d", "kiln.log.v1.x"] {
            assert!(parse_event(other).is_err(), "{other}");
        }
    }
}
