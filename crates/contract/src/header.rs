//! Message headers that are ours, or that a standard gives.

/// W3C trace context.
pub const TRACEPARENT: &str = "traceparent";

/// On a question: when its answer is of no more use, in milliseconds since the epoch.
pub const DEADLINE: &str = "Kiln-Deadline";

/// On a log chunk: the instance that wrote it.
pub const LOG_WRITER: &str = "Kiln-Writer";
/// On a log chunk: the offset of its first byte in the masked log.
pub const LOG_OFFSET: &str = "Kiln-Offset";
/// On a log chunk: attempt, a space, and the engine's cursor of the first raw byte whose masked form isn't stored yet.
pub const LOG_SOURCE_CURSOR: &str = "Kiln-Source-Cursor";
/// On the last message of a log.
pub const LOG_COMPLETE: &str = "Kiln-Complete";
/// On the messages of a log that has reached its size limit, from that one on.
pub const LOG_LIMITED: &str = "Kiln-Limited";
/// On a log chunk: the size limit that its writer keeps to, in bytes.
pub const LOG_MAX_BYTES: &str = "Kiln-Max-Bytes";

/// CloudEvents 1.0, NATS protocol binding, binary mode.
pub mod cloudevents {
    pub const SPEC_VERSION: &str = "ce-specversion";
    pub const ID: &str = "ce-id";
    pub const TYPE: &str = "ce-type";
    pub const SOURCE: &str = "ce-source";
    pub const TIME: &str = "ce-time";
    pub const SUBJECT: &str = "ce-subject";
    pub const CONTENT_TYPE: &str = "content-type";
}
