//! What `kiln build` says of a build: that it was accepted, and how it ended.

use std::time::Duration;

use kiln_proto::kiln_v1::{AlreadyBuilt, Build, BuildState};
use serde::Serialize;
use serde_json::json;

use super::super::failure::{Exit, Failure};
use super::super::json::{BuildJson, milliseconds, reason_word, state_word};
use super::super::output::{Output, printable, say, say_raw, table};
use super::super::time;

/// How a build ended, or that there was nothing to do: the last object of `--output json`.
#[derive(Debug, Serialize)]
pub(super) struct BuildResult<'a> {
    r#type: &'static str,
    /// `succeeded`, `failed`, `cancelled`, or `already_built`.
    state: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a str>,
    #[serde(rename = "ref")]
    reference: &'a str,
    base_ref: &'a str,
    digest: &'a str,
    /// From the start of the builder to the end; none for a build that never started.
    #[serde(rename = "duration_ms", serialize_with = "as_milliseconds")]
    duration: Option<Duration>,
    reason: Option<String>,
    message: &'a str,
    #[serde(skip)]
    built: bool,
}

impl<'a> BuildResult<'a> {
    /// Of a build that is over.
    pub(super) fn of(build: &'a Build) -> Self {
        Self {
            r#type: "result",
            state: state_word(build.state),
            id: Some(&build.id),
            reference: &build.r#ref,
            base_ref: &build.base_ref,
            digest: &build.digest,
            duration: time::finished_at(build).and_then(|end| time::run_time(build, end)),
            reason: reason_word(build.reason),
            message: &build.message,
            built: build.state() == BuildState::Succeeded,
        }
    }

    pub(super) fn already_built(image: &'a AlreadyBuilt) -> Self {
        Self {
            r#type: "result",
            state: "already_built".into(),
            id: None,
            reference: &image.r#ref,
            base_ref: &image.base_ref,
            digest: &image.digest,
            duration: None,
            reason: None,
            message: "",
            built: true,
        }
    }

    /// Tells the user, and says what the process ends with.
    pub(super) async fn write(self, output: &mut Output) -> Result<Exit, Failure> {
        if output.is_json() {
            output.json(&self).await?;
        } else {
            let (headline, facts) = self.words();
            say(&headline);
            say_raw(&facts);
        }
        Ok(if self.built { Exit::Done } else { Exit::NotBuilt })
    }

    /// A headline, and the facts below it, each on a line of its own.
    fn words(&self) -> (String, String) {
        let mut headline = self.state.replace('_', " ");
        if let Some(duration) = self.duration {
            headline.push_str(&format!(" after {}", time::duration(duration)));
        }
        if let Some(reason) = &self.reason {
            headline.push_str(&format!(" ({reason})"));
        }
        if !self.message.is_empty() {
            headline.push_str(&format!(": {}", printable(self.message)));
        }
        let facts = if self.built {
            [("ref", self.reference), ("digest", self.digest)]
        } else {
            [("id", self.id.unwrap_or_default()), ("", "")]
        };
        let facts = facts.into_iter().filter(|(_, value)| !value.is_empty());
        let facts = table(None, facts.map(|(name, value)| [format!("  {name}"), value.to_owned()]));
        (headline, if facts.is_empty() { facts } else { format!("{facts}\n") })
    }
}

fn as_milliseconds<S: serde::Serializer>(
    duration: &Option<Duration>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    duration.map(milliseconds).serialize(serializer)
}

/// Says that a build was accepted and won't be followed: its id, on standard output, for `$(kiln build --detach …)`.
pub(super) async fn accepted(build: &Build, joined: bool, output: &mut Output) -> Result<(), Failure> {
    if output.is_json() {
        return record(build, Some(joined), output).await;
    }
    if joined {
        say("joined a build of this image that was there already");
    }
    output.line(&printable(&build.id)).await
}

/// A build's record as an object of `--output json`; `joined` only in the first.
pub(super) async fn record(build: &Build, joined: Option<bool>, output: &mut Output) -> Result<(), Failure> {
    let build = BuildJson::from(build);
    match joined {
        Some(joined) => output.json(&json!({ "type": "build", "joined": joined, "build": build })).await,
        None => output.json(&json!({ "type": "build", "build": build })).await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_in_words() {
        let at = |seconds| Some(prost_types::Timestamp { seconds, nanos: 0 });
        let succeeded = Build {
            id: "id".into(),
            r#ref: "host/x:y".into(),
            digest: "sha256:z".into(),
            state: 3,
            started_at: at(10),
            finished_at: at(82),
            ..Build::default()
        };
        let words = |build: &Build| BuildResult::of(build).words();
        assert_eq!(
            words(&succeeded),
            ("succeeded after 1m12s".into(), "  ref     host/x:y\n  digest  sha256:z\n".into())
        );
        let failed =
            Build { state: 4, reason: 1, message: "exit 7\x07".into(), digest: String::new(), ..succeeded };
        assert_eq!(
            words(&failed),
            ("failed after 1m12s (dockerfile): exit 7\\u{7}".into(), "  id  id\n".into())
        );
        let cancelled = Build { state: 5, reason: 0, message: String::new(), started_at: None, ..failed };
        assert_eq!(words(&cancelled).0, "cancelled");
        let image = AlreadyBuilt { r#ref: "r".into(), base_ref: "b".into(), digest: String::new() };
        assert_eq!(BuildResult::already_built(&image).words(), ("already built".into(), "  ref  r\n".into()));
    }
}
