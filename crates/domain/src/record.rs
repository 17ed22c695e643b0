//! The record of a build: everything that is known of it after its last event.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::engine::Handle;
use crate::failure::FailureReason;
use crate::id::{BuildId, ImageKey, InstanceId, RunId};
use crate::reference::Digest;
use crate::run::{Base, BuiltImage};
use crate::source::Source;
use crate::step::Step;

/// Where a build is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum State {
    Queued,
    Running,
    Succeeded,
    Failed,
    Cancelled,
    /// A state of a newer release. Only that one may change the build: [`crate::transition::apply`] refuses to.
    #[serde(other)]
    #[schemars(skip)]
    Unknown,
}

impl State {
    /// `false` also where it isn't known.
    pub fn is_terminal(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Cancelled)
    }

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Queued => "QUEUED",
            Self::Running => "RUNNING",
            Self::Succeeded => "SUCCEEDED",
            Self::Failed => "FAILED",
            Self::Cancelled => "CANCELLED",
            Self::Unknown => "UNKNOWN",
        }
    }
}

impl std::fmt::Display for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The whole record of one build. Each event of the journal carries it as it is after that event.
///
/// Times are those that the journal's stream gave the events; the event that makes a time so carries a record
/// without it (see [`Record::at`]).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Record {
    pub id: BuildId,
    /// The target: what the finished image is called.
    #[serde(rename = "ref")]
    pub target_ref: String,
    pub base_ref: String,
    pub source: Source,
    /// The commit that is built, for a Dockerfile from git.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub commit: Option<String>,
    /// The base image exists already: only the copy to the target is to be made.
    #[serde(default)]
    pub base_exists: bool,
    /// The digest at the target when the build was accepted, if there was an image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest_before: Option<Digest>,
    pub state: State,
    /// Of a failed build.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<FailureReason>,
    /// For the user; of a failed or cancelled build, or of one that waits to be started again: what kept it from that.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// Who asked first.
    pub owner: String,
    /// Who joined, without the first; bounded.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub joined_by: Vec<String>,
    /// The requests that were answered with this build, the one that made it first; bounded.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub requests: Vec<String>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    #[serde(default)]
    pub no_cache: bool,
    /// How long an attempt may run, from `started`.
    pub timeout_ms: u64,
    /// How long it may wait for a builder: before its first start, and again after each lost one.
    pub queue_limit_ms: u64,
    /// 1 for the first start; a start after a lost builder counts up.
    pub attempt: u32,
    /// How often it was claimed. A build that never was may be ended by anybody.
    #[serde(default)]
    pub claims: u32,
    /// Who acts on it now, if anybody.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub claimed_by: Option<InstanceId>,
    /// The running attempt's builder; absent before `started` and after `retrying`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub handle: Option<Handle>,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub engine: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub build_tool: String,
    /// Somebody asked that it stop, and why (may be empty).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cancel: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queued_at: Option<Timestamp>,
    /// Of the first attempt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at: Option<Timestamp>,
    /// Of the attempt that runs; its deadline counts from here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attempt_started_at: Option<Timestamp>,
    /// When the attempt before the present one was given up for lost.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retried_at: Option<Timestamp>,
    /// When a holder last let go of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub released_at: Option<Timestamp>,
    /// How many holders in a row let go of it because the engine would not start this attempt.
    #[serde(default)]
    pub refused_starts: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<Timestamp>,
    /// Of the image at the target, once it succeeded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<Digest>,
    /// Every step with its time, once the build is over; bounded.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub steps: Vec<Step>,
    /// Every image that a FROM names, once the build is over; bounded.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub bases: Vec<Base>,
    /// Digest and size for each platform, once it succeeded.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub images: Vec<BuiltImage>,
    /// W3C trace context of the request that made it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub traceparent: String,
    /// What a newer release wrote here: carried on as it is.
    #[serde(flatten)]
    #[schemars(skip)]
    pub unknown: BTreeMap<String, serde_json::Value>,
}

impl Record {
    /// A build that was accepted and no more. What its request says besides is for the caller to fill in; its limits are zero.
    pub fn accepted(
        id: BuildId,
        target_ref: String,
        base_ref: String,
        source: Source,
        owner: String,
    ) -> Self {
        Self {
            id,
            target_ref,
            base_ref,
            source,
            commit: None,
            base_exists: false,
            digest_before: None,
            state: State::Queued,
            reason: None,
            message: String::new(),
            owner,
            joined_by: Vec::new(),
            requests: Vec::new(),
            labels: BTreeMap::new(),
            no_cache: false,
            timeout_ms: 0,
            queue_limit_ms: 0,
            attempt: 1,
            claims: 0,
            claimed_by: None,
            handle: None,
            engine: String::new(),
            build_tool: String::new(),
            cancel: None,
            queued_at: None,
            started_at: None,
            attempt_started_at: None,
            retried_at: None,
            released_at: None,
            refused_starts: 0,
            finished_at: None,
            digest: None,
            steps: Vec::new(),
            bases: Vec::new(),
            images: Vec::new(),
            traceparent: String::new(),
            unknown: BTreeMap::new(),
        }
    }

    pub fn image_key(&self) -> ImageKey {
        self.id.image_key()
    }

    /// The run of the present attempt.
    pub fn run(&self) -> RunId {
        RunId::new(&self.id, self.attempt)
    }

    /// Whether it waits for a slot; one that is claimed has it, though it may not run yet.
    pub fn waits(&self) -> bool {
        self.state == State::Queued && self.claimed_by.is_none()
    }

    pub fn timeout(&self) -> Duration {
        Duration::from_millis(self.timeout_ms)
    }

    /// When the running attempt must have ended.
    pub fn deadline(&self) -> Option<Timestamp> {
        self.attempt_started_at.and_then(|started| started.checked_add(self.timeout()).ok())
    }

    /// Whether the running attempt's time is up.
    pub fn is_past_deadline(&self, now: Timestamp) -> bool {
        self.deadline().is_some_and(|deadline| deadline <= now)
    }

    /// Everybody who waits for it, the first asker first.
    pub fn owners(&self) -> impl Iterator<Item = &str> {
        std::iter::once(self.owner.as_str()).chain(self.joined_by.iter().map(String::as_str))
    }

    /// The record as read from an event: the time that the stream gave the event is filled in where this event is
    /// what made it so.
    pub fn at(mut self, event: &str, stored_at: Timestamp) -> Self {
        match event {
            "queued" => self.queued_at = Some(stored_at),
            "started" => {
                self.started_at.get_or_insert(stored_at);
                self.attempt_started_at = Some(stored_at);
            }
            "retrying" => self.retried_at = Some(stored_at),
            "released" => self.released_at = Some(stored_at),
            "succeeded" | "failed" | "cancelled" => self.finished_at = Some(stored_at),
            _ => {}
        }
        self
    }
}
