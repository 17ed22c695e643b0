//! What a resolver is asked.

use bytes::Bytes;

use crate::question::Question;

const SERVICE: &str = "resolver";

/// The digest of this image for one platform.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ResolveImage {
    /// As the user wrote it.
    #[prost(string, tag = "1")]
    pub reference: String,
    /// Empty for linux/amd64.
    #[prost(string, tag = "2")]
    pub platform: String,
    /// Sealed [`crate::secrets::Secrets`], of which only the registry credentials are used; may be empty.
    #[prost(bytes = "bytes", tag = "3")]
    pub secrets: Bytes,
    /// Ask the registry even where a cached answer is fresh.
    #[prost(bool, tag = "4")]
    pub refresh: bool,
}

impl Question for ResolveImage {
    const SERVICE: &'static str = SERVICE;
    const VERB: &'static str = "image";
    type Answer = ResolvedImage;
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct ResolvedImage {
    /// `name@sha256:…`.
    #[prost(string, tag = "1")]
    pub reference: String,
    #[prost(bool, tag = "2")]
    pub stale: bool,
    /// How long ago the registry said so.
    #[prost(uint64, tag = "3")]
    pub age_ms: u64,
    /// The mirror (`host[:port]`) that said so; empty where it was the registry itself.
    #[prost(string, tag = "4")]
    pub mirror: String,
    /// It was known: nobody was asked for it now.
    #[prost(bool, tag = "5")]
    pub cached: bool,
    /// How long it may be given again, to who asks the same with the same credentials, without asking a resolver.
    #[prost(uint64, tag = "6")]
    pub fresh_for_ms: u64,
}

/// The commit that a revision of a git remote is now. That it is answered also shows that the caller may read it.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ResolveCommit {
    #[prost(string, tag = "1")]
    pub remote_uri: String,
    /// Empty for the remote's HEAD.
    #[prost(string, tag = "2")]
    pub revision: String,
    /// Sealed [`crate::secrets::Secrets`], of which only the git credentials are used; may be empty.
    #[prost(bytes = "bytes", tag = "3")]
    pub secrets: Bytes,
}

impl Question for ResolveCommit {
    const SERVICE: &'static str = SERVICE;
    const VERB: &'static str = "commit";
    type Answer = ResolvedCommit;
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct ResolvedCommit {
    #[prost(string, tag = "1")]
    pub commit: String,
}

/// What lies at a target or base ref of this installation right now. Always the registry's own word, never a cache's.
#[derive(Clone, PartialEq, prost::Message)]
pub struct FindImage {
    #[prost(string, tag = "1")]
    pub reference: String,
}

impl Question for FindImage {
    const SERVICE: &'static str = SERVICE;
    const VERB: &'static str = "find";
    type Answer = FoundImage;
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct FoundImage {
    /// Empty when nothing lies there.
    #[prost(string, tag = "1")]
    pub digest: String,
}
