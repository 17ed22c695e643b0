//! The events of a build: CloudEvents in binary mode whose data is the build's record as JSON.

/// `ce-type` of an event: `dev.kiln.build.<event>.v1`.
pub fn cloudevents_type(event: &str) -> String {
    format!("dev.kiln.build.{event}.v1")
}

/// `ce-source` of what an instance appends: `/kiln/<instance>`.
pub fn cloudevents_source(instance: &str) -> String {
    format!("/kiln/{instance}")
}

/// The content type of every event's data.
pub const CONTENT_TYPE: &str = "application/json";

/// The running step of a build, as `KILN_PROGRESS` carries it.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
pub struct Progress {
    pub attempt: u32,
    pub step: kiln_domain::step::Step,
}
