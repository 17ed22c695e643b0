//! What a cache-warmer is asked.

use crate::question::Question;

/// Which images are kept warm, and how old is each one's answer?
#[derive(Clone, PartialEq, prost::Message)]
pub struct ListWarm {}

impl Question for ListWarm {
    const SERVICE: &'static str = "cache-warmer";
    const VERB: &'static str = "list";
    type Answer = WarmList;
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct WarmList {
    /// Those of the configured list first, then by use.
    #[prost(message, repeated, tag = "1")]
    pub images: Vec<WarmImage>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct WarmImage {
    #[prost(string, tag = "1")]
    pub reference: String,
    /// `name@sha256:…`, as the resolver last answered; empty while it never has.
    #[prost(string, tag = "2")]
    pub resolved: String,
    /// How long ago the registry said so.
    #[prost(uint64, tag = "3")]
    pub age_ms: u64,
    /// It stands in the configured list; else builds used it.
    #[prost(bool, tag = "4")]
    pub configured: bool,
    /// Builds that used it, of the newest that the warmer looks at.
    #[prost(uint32, tag = "5")]
    pub builds: u32,
    /// When a build last used it, in milliseconds since the epoch; 0 if none did.
    #[prost(int64, tag = "6")]
    pub last_used_ms: i64,
    /// Why it isn't warm now; empty if it is.
    #[prost(string, tag = "7")]
    pub trouble: String,
}
