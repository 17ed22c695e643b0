//! Records as the API shows them.

use std::time::Duration;

use jiff::Timestamp;
use kiln_bus::journal::Entry;
use kiln_bus::logs::{Chunk, LogInfo};
use kiln_contract::cache_warmer::WarmImage;
use kiln_contract::event::Progress;
use kiln_contract::resolver::ResolvedImage;
use kiln_domain::failure::FailureReason;
use kiln_domain::id::BuildId;
use kiln_domain::platform::Platform;
use kiln_domain::record::State;
use kiln_domain::run::BuiltImage;
use kiln_domain::step::Step;
use kiln_proto::kiln_v1 as api;

/// A build as a client sees it. `queue_position` is the number of builds ahead of it.
pub(crate) fn build(entry: &Entry, queue_position: usize, progress: Option<&Progress>) -> api::Build {
    let record = &entry.record;
    let running = progress.filter(|p| record.state == State::Running && p.attempt == record.attempt);
    api::Build {
        id: record.id.to_string(),
        r#ref: record.target_ref.clone(),
        base_ref: record.base_ref.clone(),
        state: state(record.state).into(),
        reason: record.reason.map_or(api::FailureReason::Unspecified, reason).into(),
        message: record.message.clone(),
        owner: record.owner.clone(),
        attempt: record.attempt,
        queued_at: record.queued_at.map(timestamp),
        started_at: record.started_at.map(timestamp),
        finished_at: record.finished_at.map(timestamp),
        digest: record.digest.as_ref().map(ToString::to_string).unwrap_or_default(),
        engine: record.engine.clone(),
        labels: record.labels.clone().into_iter().collect(),
        revision: entry.sequence,
        queue_position: u32::try_from(queue_position).unwrap_or(u32::MAX),
        current_step: running.map(|progress| step(&progress.step)),
        steps: record.steps.iter().map(step).collect(),
        build_tool: record.build_tool.clone(),
        commit: record.commit.clone().unwrap_or_default(),
        images: record.images.iter().map(built_image).collect(),
    }
}

fn built_image(image: &BuiltImage) -> api::BuiltImage {
    let BuiltImage { platform, digest, bytes } = image;
    api::BuiltImage { platform: platform.to_string(), digest: digest.to_string(), bytes: *bytes }
}

/// A reference's immutable form, as a client sees it.
pub(crate) fn resolved_image(image: ResolvedImage, platform: &Platform) -> api::ResolveBaseImageResponse {
    api::ResolveBaseImageResponse {
        r#ref: image.reference,
        stale: image.stale,
        age: prost_types::Duration::try_from(Duration::from_millis(image.age_ms)).ok(),
        cached: image.cached,
        mirror: image.mirror,
        platform: platform.to_string(),
    }
}

/// An image that is kept warm, as a client sees it.
pub(crate) fn warm_image(image: WarmImage) -> api::WarmImage {
    api::WarmImage {
        r#ref: image.reference,
        resolved: image.resolved,
        age: prost_types::Duration::try_from(Duration::from_millis(image.age_ms)).ok(),
        configured: image.configured,
        builds: image.builds,
        last_used_at: Timestamp::from_millisecond(image.last_used_ms)
            .ok()
            .filter(|_| image.last_used_ms > 0)
            .map(timestamp),
        trouble: image.trouble,
    }
}

/// A piece of a log.
pub(crate) fn chunk(chunk: Chunk) -> api::LogChunk {
    api::LogChunk { content: chunk.bytes.to_vec(), offset: chunk.offset, complete: chunk.complete }
}

/// What is to be said of a log.
pub(crate) fn log_info(id: &BuildId, info: &LogInfo) -> api::LogInfo {
    let expires = |stored: Timestamp| {
        // For NATS, no age is every age.
        let end = stored.checked_add(info.max_age).ok().filter(|_| !info.max_age.is_zero());
        end.map(timestamp)
    };
    let (first, last) = info.stored;
    api::LogInfo {
        id: id.to_string(),
        length: info.extent.end,
        first_offset: info.extent.first,
        chunks: info.chunks,
        complete: info.extent.complete,
        limited: info.limited,
        first_stored_at: Some(timestamp(first)),
        last_stored_at: Some(timestamp(last)),
        first_expires_at: expires(first),
        last_expires_at: expires(last),
        max_bytes: info.max_bytes.unwrap_or_default(),
        max_age: prost_types::Duration::try_from(info.max_age).ok().filter(|_| !info.max_age.is_zero()),
        all_logs_bytes: info.all_bytes,
        all_logs_max_bytes: info.all_max_bytes.unwrap_or_default(),
    }
}

pub(crate) fn state(state: State) -> api::BuildState {
    match state {
        State::Queued => api::BuildState::Queued,
        State::Running => api::BuildState::Running,
        State::Succeeded => api::BuildState::Succeeded,
        State::Failed => api::BuildState::Failed,
        State::Cancelled => api::BuildState::Cancelled,
        State::Unknown => api::BuildState::Unspecified,
    }
}

fn reason(reason: FailureReason) -> api::FailureReason {
    match reason {
        FailureReason::Dockerfile => api::FailureReason::Dockerfile,
        FailureReason::Context => api::FailureReason::Context,
        FailureReason::RegistryDenied => api::FailureReason::RegistryDenied,
        FailureReason::Timeout => api::FailureReason::Timeout,
        FailureReason::EngineLost => api::FailureReason::EngineLost,
        FailureReason::ImageMissing => api::FailureReason::ImageMissing,
        FailureReason::Internal | FailureReason::Unknown => api::FailureReason::Internal,
        FailureReason::QueueExpired => api::FailureReason::QueueExpired,
        FailureReason::OutOfMemory => api::FailureReason::OutOfMemory,
        FailureReason::RegistryUnavailable => api::FailureReason::RegistryUnavailable,
    }
}

fn step(step: &Step) -> api::Step {
    api::Step {
        number: step.number,
        of: step.of,
        name: step.name.clone(),
        started_at: Some(timestamp(step.started_at)),
        duration: step.duration_ms.map(|ms| prost_types::Duration {
            seconds: i64::try_from(ms / 1000).unwrap_or(i64::MAX),
            nanos: i32::try_from(ms % 1000).unwrap_or(0) * 1_000_000,
        }),
        cached: step.cached,
    }
}

fn timestamp(at: Timestamp) -> prost_types::Timestamp {
    prost_types::Timestamp { seconds: at.as_second(), nanos: at.subsec_nanosecond() }
}
