//! What an orchestrator is asked.

use std::collections::HashMap;

use bytes::Bytes;
use kiln_domain::record::Record;
use kiln_domain::source::Source;

use crate::error::{Code, Refusal};
use crate::question::Question;

const SERVICE: &str = "orchestrator";

/// Build this, or join who builds it, or say that it is there.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Build {
    /// Made by the gateway for each call: met again, it gets the same answer.
    #[prost(string, tag = "1")]
    pub request_id: String,
    /// A [`Source`] as JSON.
    #[prost(bytes = "bytes", tag = "2")]
    pub source: Bytes,
    /// Sealed [`crate::secrets::Secrets`].
    #[prost(bytes = "bytes", tag = "3")]
    pub secrets: Bytes,
    #[prost(bool, tag = "4")]
    pub force: bool,
    #[prost(string, tag = "5")]
    pub owner: String,
    /// 0 for the service's default.
    #[prost(uint64, tag = "6")]
    pub timeout_ms: u64,
    #[prost(map = "string, string", tag = "7")]
    pub labels: HashMap<String, String>,
    #[prost(bool, tag = "8")]
    pub no_cache: bool,
    /// See [`WorkspaceImage::clone_target`].
    #[prost(string, optional, tag = "9")]
    pub clone_target: Option<String>,
    /// Why the context can't be fetched by a builder of ours; empty if it can. An engine whose builders fetch it as the
    /// request says it does not mind.
    #[prost(string, tag = "10")]
    pub unfetchable: String,
}

impl Question for Build {
    const SERVICE: &'static str = SERVICE;
    const VERB: &'static str = "build";
    type Answer = BuildAnswer;
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct BuildAnswer {
    /// The build; absent when the image is there already.
    #[prost(message, optional, tag = "1")]
    pub build: Option<RecordAt>,
    #[prost(bool, tag = "2")]
    pub joined: bool,
    #[prost(message, optional, tag = "3")]
    pub already_built: Option<AlreadyBuilt>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct AlreadyBuilt {
    #[prost(string, tag = "1")]
    pub target_ref: String,
    #[prost(string, tag = "2")]
    pub base_ref: String,
    #[prost(string, tag = "3")]
    pub digest: String,
}

/// A record with its place in the journal.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RecordAt {
    /// A [`Record`] as JSON.
    #[prost(bytes = "bytes", tag = "1")]
    pub record: Bytes,
    /// The stream sequence of the build's last event: it grows with every change.
    #[prost(uint64, tag = "2")]
    pub revision: u64,
}

impl RecordAt {
    pub fn new(record: &Record, revision: u64) -> Result<Self, Refusal> {
        Ok(Self { record: to_json(record)?, revision })
    }

    pub fn record(&self) -> Result<Record, Refusal> {
        from_json(&self.record)
    }
}

/// Stop this build.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Cancel {
    #[prost(string, tag = "1")]
    pub build_id: String,
    #[prost(string, tag = "2")]
    pub reason: String,
}

impl Question for Cancel {
    const SERVICE: &'static str = SERVICE;
    const VERB: &'static str = "cancel";
    type Answer = RecordAt;
}

/// Which image would this source make, and is it there?
#[derive(Clone, PartialEq, prost::Message)]
pub struct WorkspaceImage {
    /// A [`Source`] as JSON.
    #[prost(bytes = "bytes", tag = "1")]
    pub source: Bytes,
    /// Sealed [`crate::secrets::Secrets`].
    #[prost(bytes = "bytes", tag = "2")]
    pub secrets: Bytes,
    /// The image is to be named as image-builder-mk3 names it, of what the request says, and nobody is asked: this text
    /// stands in the commit's place, and an image reference for itself.
    #[prost(string, optional, tag = "3")]
    pub clone_target: Option<String>,
}

impl Question for WorkspaceImage {
    const SERVICE: &'static str = SERVICE;
    const VERB: &'static str = "workspace-image";
    type Answer = WorkspaceImageAnswer;
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct WorkspaceImageAnswer {
    #[prost(string, tag = "1")]
    pub target_ref: String,
    #[prost(string, tag = "2")]
    pub base_ref: String,
    #[prost(bool, tag = "3")]
    pub exists: bool,
}

/// How can a client read these outputs by itself? And what do others build in the same place?
#[derive(Clone, PartialEq, prost::Message)]
pub struct OutputAccess {
    /// Of running builds.
    #[prost(string, repeated, tag = "1")]
    pub runs: Vec<String>,
    #[prost(bool, tag = "2")]
    pub others: bool,
    /// The public key of the asker, for whom the answer is sealed.
    #[prost(string, tag = "3")]
    pub seal_to: String,
}

impl Question for OutputAccess {
    const SERVICE: &'static str = SERVICE;
    const VERB: &'static str = "output-access";
    type Answer = OutputAccessAnswer;
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct OutputAccessAnswer {
    /// Sealed [`crate::secrets::OutputAccesses`].
    #[prost(bytes = "bytes", tag = "1")]
    pub sealed: Bytes,
    /// Runs of which it can't be said yet; those that are in neither have no such access.
    #[prost(string, repeated, tag = "2")]
    pub not_yet: Vec<String>,
}

/// A source as a question carries it.
pub fn source_to_json(source: &Source) -> Result<Bytes, Refusal> {
    to_json(source)
}

/// The source of a question.
pub fn source_from_json(json: &[u8]) -> Result<Source, Refusal> {
    from_json(json)
}

fn to_json(value: &impl serde::Serialize) -> Result<Bytes, Refusal> {
    serde_json::to_vec(value)
        .map(Bytes::from)
        .map_err(|error| Refusal::new(Code::Internal, format!("a message can't be written as JSON: {error}")))
}

fn from_json<T: serde::de::DeserializeOwned>(json: &[u8]) -> Result<T, Refusal> {
    serde_json::from_slice(json).map_err(|error| {
        Refusal::new(Code::Internal, format!("a message of another release can't be read: {error}"))
    })
}
