//! Records as the compatible API shows them.

use kiln_domain::failure::FailureReason;
use kiln_domain::record::{Record, State};
use kiln_proto::builder as api;

/// A build for a list, or beside its status.
pub(crate) fn of(record: &Record) -> api::BuildInfo {
    api::BuildInfo {
        r#ref: record.target_ref.clone(),
        status: status(record.state).into(),
        started_at: record.started_at.or(record.queued_at).map_or(0, |at| at.as_second()),
        base_ref: record.base_ref.clone(),
        build_id: record.id.to_string(),
        log_info: None,
    }
}

/// A build as its stream tells it.
pub(crate) fn response(record: &Record) -> api::BuildResponse {
    api::BuildResponse {
        r#ref: record.target_ref.clone(),
        status: status(record.state).into(),
        message: message(record),
        base_ref: record.base_ref.clone(),
        info: Some(of(record)),
    }
}

/// A build that waits is `running` too: to mk3's clients that means that one is needed.
fn status(state: State) -> api::BuildStatus {
    match state {
        // What a newer release calls its state is no end.
        State::Queued | State::Running | State::Unknown => api::BuildStatus::Running,
        State::Succeeded => api::BuildStatus::DoneSuccess,
        State::Failed | State::Cancelled => api::BuildStatus::DoneFailure,
    }
}

/// Why it failed. Gitpod's server takes what begins with `build failed:` for the user's mistake, and raises an alarm of
/// anything else.
fn message(record: &Record) -> String {
    let why = &record.message;
    match (record.state, record.reason) {
        (State::Cancelled, _) if why.is_empty() => "build failed: it was cancelled".into(),
        (State::Cancelled, _) => format!("build failed: it was cancelled: {why}"),
        (State::Failed, Some(reason)) if is_the_users(reason) => format!("build failed: {why}"),
        (State::Failed, Some(FailureReason::ImageMissing)) => {
            format!("image build did not produce a workspace image: {why}")
        }
        (State::Failed, _) => format!("image build failed: {why}"),
        (State::Queued | State::Running | State::Succeeded | State::Unknown, _) => String::new(),
    }
}

fn is_the_users(reason: FailureReason) -> bool {
    match reason {
        FailureReason::Dockerfile
        | FailureReason::Context
        | FailureReason::RegistryDenied
        | FailureReason::Timeout
        | FailureReason::OutOfMemory => true,
        FailureReason::EngineLost
        | FailureReason::ImageMissing
        | FailureReason::Internal
        | FailureReason::QueueExpired
        | FailureReason::RegistryUnavailable
        | FailureReason::Unknown => false,
    }
}

#[cfg(test)]
mod tests {
    use kiln_domain::id::{BuildId, ImageKey};
    use kiln_domain::source::Source;

    use super::*;

    fn record(state: State, reason: Option<FailureReason>, message: &str) -> Record {
        let id = BuildId::new(&ImageKey::of("r.test/t:x"), [1; 10]);
        let source = Source::Image("r.test/x:1".parse().unwrap());
        let record = Record::accepted(id, "r.test/t:x".into(), "r.test/b:x".into(), source, "ann".into());
        Record { state, reason, message: message.into(), ..record }
    }

    /// As Gitpod's server tells whose mistake a failed build was.
    fn looks_like_user_error(message: &str) -> bool {
        message.starts_with("build failed:")
            || message.contains("headless task failed:")
            || message.contains("cannot resolve image")
    }

    #[test]
    fn the_server_tells_a_users_mistake_from_ours() {
        use FailureReason::{
            Dockerfile, EngineLost, ImageMissing, OutOfMemory, RegistryUnavailable, Timeout,
        };
        for (state, reason, the_users) in [
            (State::Failed, Some(Dockerfile), true),
            (State::Failed, Some(Timeout), true),
            (State::Failed, Some(OutOfMemory), true),
            (State::Cancelled, None, true),
            (State::Failed, Some(EngineLost), false),
            (State::Failed, Some(ImageMissing), false),
            (State::Failed, Some(RegistryUnavailable), false),
            (State::Failed, None, false),
        ] {
            let response = response(&record(state, reason, "step 3 failed"));
            assert_eq!(response.status(), api::BuildStatus::DoneFailure);
            assert!(response.message.ends_with("step 3 failed"), "{}", response.message);
            assert_eq!(looks_like_user_error(&response.message), the_users, "{}", response.message);
        }
    }

    #[test]
    fn a_build_that_waits_is_needed() {
        let response = response(&record(State::Queued, None, "attempt 1 was lost"));
        assert_eq!((response.status(), response.message.as_str()), (api::BuildStatus::Running, ""));
        assert_eq!((response.r#ref.as_str(), response.base_ref.as_str()), ("r.test/t:x", "r.test/b:x"));
    }
}
