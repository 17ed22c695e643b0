//! The JSON forms: field names as in the API, words in lower case, times as RFC 3339, durations in
//! milliseconds.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use kiln_proto::kiln_v1::{Build, BuildState, BuiltImage, FailureReason, LogInfo, Step};
use serde::Serialize;

use super::stream::Piece;
use super::time::{self, timestamp};

/// A build's record.
#[derive(Debug, Serialize)]
pub(super) struct BuildJson<'a> {
    id: &'a str,
    #[serde(rename = "ref")]
    reference: &'a str,
    base_ref: &'a str,
    state: String,
    reason: Option<String>,
    message: &'a str,
    owner: &'a str,
    attempt: u32,
    queued_at: Option<String>,
    started_at: Option<String>,
    finished_at: Option<String>,
    digest: &'a str,
    commit: &'a str,
    engine: &'a str,
    build_tool: &'a str,
    labels: BTreeMap<&'a str, &'a str>,
    revision: u64,
    queue_position: u32,
    current_step: Option<StepJson<'a>>,
    steps: Vec<StepJson<'a>>,
    images: Vec<ImageJson<'a>>,
}

#[derive(Debug, Serialize)]
struct ImageJson<'a> {
    platform: &'a str,
    digest: &'a str,
    bytes: u64,
}

#[derive(Debug, Serialize)]
struct StepJson<'a> {
    number: u32,
    of: u32,
    name: &'a str,
    started_at: Option<String>,
    duration_ms: Option<u64>,
    cached: bool,
}

impl<'a> From<&'a Build> for BuildJson<'a> {
    fn from(build: &'a Build) -> Self {
        Self {
            id: &build.id,
            reference: &build.r#ref,
            base_ref: &build.base_ref,
            state: state_word(build.state),
            reason: reason_word(build.reason),
            message: &build.message,
            owner: &build.owner,
            attempt: build.attempt,
            queued_at: time::queued_at(build).map(|at| at.to_string()),
            started_at: time::started_at(build).map(|at| at.to_string()),
            finished_at: time::finished_at(build).map(|at| at.to_string()),
            digest: &build.digest,
            commit: &build.commit,
            engine: &build.engine,
            build_tool: &build.build_tool,
            labels: build.labels.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect(),
            revision: build.revision,
            queue_position: build.queue_position,
            current_step: build.current_step.as_ref().map(StepJson::from),
            steps: build.steps.iter().map(StepJson::from).collect(),
            images: build.images.iter().map(ImageJson::from).collect(),
        }
    }
}

impl<'a> From<&'a BuiltImage> for ImageJson<'a> {
    fn from(image: &'a BuiltImage) -> Self {
        Self { platform: &image.platform, digest: &image.digest, bytes: image.bytes }
    }
}

impl<'a> From<&'a Step> for StepJson<'a> {
    fn from(step: &'a Step) -> Self {
        let started = step.started_at.as_ref().and_then(|at| timestamp(at.seconds, at.nanos));
        Self {
            number: step.number,
            of: step.of,
            name: &step.name,
            started_at: started.map(|at| at.to_string()),
            duration_ms: step_duration(step).map(milliseconds),
            cached: step.cached,
        }
    }
}

/// A part of a log. `text` is for reading, with U+FFFD for what isn't UTF-8; where that loses anything (a chunk may also end
/// within a character), `base64` has the exact bytes. The next part begins at `offset + length`.
#[derive(Debug, Serialize)]
pub(super) struct LogJson {
    r#type: &'static str,
    offset: u64,
    length: usize,
    text: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    base64: Option<String>,
    complete: bool,
}

impl From<&Piece> for LogJson {
    fn from(piece: &Piece) -> Self {
        let exact = str::from_utf8(&piece.content).is_ok();
        Self {
            r#type: "log",
            offset: piece.offset,
            length: piece.content.len(),
            text: String::from_utf8_lossy(&piece.content).into_owned(),
            base64: (!exact).then(|| STANDARD.encode(&piece.content)),
            complete: piece.complete,
        }
    }
}

/// What is to be said of a log.
#[derive(Debug, Serialize)]
pub(super) struct LogInfoJson<'a> {
    id: &'a str,
    length: u64,
    first_offset: u64,
    chunks: u64,
    complete: bool,
    limited: bool,
    first_stored_at: Option<String>,
    last_stored_at: Option<String>,
    first_expires_at: Option<String>,
    last_expires_at: Option<String>,
    max_bytes: Option<u64>,
    max_age_seconds: Option<i64>,
    all_logs_bytes: u64,
    all_logs_max_bytes: Option<u64>,
}

impl<'a> From<&'a LogInfo> for LogInfoJson<'a> {
    fn from(info: &'a LogInfo) -> Self {
        let at = |at: &Option<prost_types::Timestamp>| {
            at.as_ref().and_then(|at| timestamp(at.seconds, at.nanos)).map(|at| at.to_string())
        };
        Self {
            id: &info.id,
            length: info.length,
            first_offset: info.first_offset,
            chunks: info.chunks,
            complete: info.complete,
            limited: info.limited,
            first_stored_at: at(&info.first_stored_at),
            last_stored_at: at(&info.last_stored_at),
            first_expires_at: at(&info.first_expires_at),
            last_expires_at: at(&info.last_expires_at),
            max_bytes: (info.max_bytes > 0).then_some(info.max_bytes),
            max_age_seconds: info.max_age.as_ref().map(|age| age.seconds),
            all_logs_bytes: info.all_logs_bytes,
            all_logs_max_bytes: (info.all_logs_max_bytes > 0).then_some(info.all_logs_max_bytes),
        }
    }
}

/// `queued`, `running`, …; a state that this program doesn't know: `state-9`.
pub(super) fn state_word(state: i32) -> String {
    BuildState::try_from(state).map_or_else(
        |_| format!("state-{state}"),
        |state| state.as_str_name().trim_start_matches("BUILD_STATE_").to_ascii_lowercase(),
    )
}

/// `dockerfile`, `context`, …; none where there is no reason.
pub(super) fn reason_word(reason: i32) -> Option<String> {
    match FailureReason::try_from(reason) {
        Ok(FailureReason::Unspecified) => None,
        Ok(reason) => Some(reason.as_str_name().trim_start_matches("FAILURE_REASON_").to_ascii_lowercase()),
        Err(_) => Some(format!("reason-{reason}")),
    }
}

/// How long a step took, if it is over.
pub(super) fn step_duration(step: &Step) -> Option<std::time::Duration> {
    let duration = step.duration.as_ref()?;
    let nanos = u32::try_from(duration.nanos).ok().filter(|nanos| *nanos < 1_000_000_000)?;
    Some(std::time::Duration::new(u64::try_from(duration.seconds).ok()?, nanos))
}

pub(super) fn milliseconds(duration: std::time::Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_part_loses_nothing() {
        let json = |content: &[u8]| {
            let piece = Piece { offset: 7, content: content.to_vec(), complete: false };
            serde_json::to_string(&LogJson::from(&piece)).unwrap()
        };
        assert_eq!(
            json(b"a\x1b\n"),
            r#"{"type":"log","offset":7,"length":3,"text":"a\u001b\n","complete":false}"#
        );
        assert_eq!(
            json(b"\xc3"),
            "{\"type\":\"log\",\"offset\":7,\"length\":1,\"text\":\"\u{fffd}\",\"base64\":\"ww==\",\"complete\":false}"
        );
    }

    #[test]
    fn words() {
        assert_eq!(state_word(2), "running");
        assert_eq!(state_word(77), "state-77");
        assert_eq!(reason_word(0), None);
        assert_eq!(reason_word(10).as_deref(), Some("registry_unavailable"));
        assert_eq!(reason_word(77).as_deref(), Some("reason-77"));
    }
}
