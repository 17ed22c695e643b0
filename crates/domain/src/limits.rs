//! The bounds of a record: what keeps an event small enough to be appended when the stream is nearly full.

use std::time::Duration;

/// What a full record comes to as JSON: its steps and base images, and a request of [`REQUEST_BYTES`].
pub const RECORD_BYTES: u64 = 768 * 1024;
/// Steps kept in a record; later ones are counted in the log only.
pub const STEPS: usize = 1_000;
/// Bytes of a step's or base image's name.
pub const NAME_BYTES: usize = 256;
/// Bytes of a failure's or cancel's message.
pub const MESSAGE_BYTES: usize = 4 * 1024;
/// Base images (`FROM`) kept in a record.
pub const BASES: usize = 200;
/// Owners that may wait for one build and are named in it.
pub const OWNERS: usize = 64;
/// Request ids kept in a record, so that a repeated question is recognised.
pub const REQUESTS: usize = 64;
/// Bytes of build args and labels together, and of secrets.
pub const REQUEST_BYTES: usize = 256 * 1024;
/// Bytes of an image reference as a user writes it.
pub const REFERENCE_BYTES: usize = 1_024;
/// Bytes of a path, a revision, an owner.
pub const FIELD_BYTES: usize = 1_024;
/// Platforms of one image.
pub const PLATFORMS: usize = 16;
/// Starts of a builder for one build.
pub const ATTEMPTS: u32 = 3;
/// The longest a build may wait or run.
pub const LONGEST: Duration = Duration::from_secs(24 * 60 * 60);

/// How long one request to a registry may take; so long a PUT of a manifest that has begun is waited for.
pub const REGISTRY_REQUEST: Duration = Duration::from_secs(30);
/// A manifest that was PUT as a builder's last act may be under way inside the registry for so long after the builder's end.
pub const IN_FLIGHT: Duration = Duration::from_secs(2);

/// `text`, cut at a character border to at most `bytes`, the cut marked by `…`.
pub fn truncated(mut text: String, bytes: usize) -> String {
    const MARK: &str = "…";
    if text.len() > bytes {
        let mut end = bytes.saturating_sub(MARK.len());
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        text.truncate(end);
        text.push_str(MARK);
    }
    text
}
