//! The key-value buckets.

/// Which instances live: instance id → role, life, host and seal key, with a time to live.
pub const HOLDERS: &str = "KILN_HOLDERS";
/// Sealed secrets of builds: build id → sealed [`crate::secrets::Secrets`]. Its keys are the list of builds that are
/// not cleaned up yet.
pub const SECRETS: &str = "KILN_SECRETS";
/// Runs that must not be started any more, of engines whose place forgets them: run id → `revoked` or `removed`.
pub const REVOCATIONS: &str = "KILN_REVOCATIONS";
/// The resolver's answers.
pub const REFS: &str = "KILN_REFS";

/// The stream that a bucket is kept in.
pub fn stream(bucket: &str) -> String {
    format!("KV_{bucket}")
}

/// The subject of a bucket's key.
pub fn subject(bucket: &str, key: impl std::fmt::Display) -> String {
    format!("$KV.{bucket}.{key}")
}
