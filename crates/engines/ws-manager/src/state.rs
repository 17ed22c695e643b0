//! What ws-manager's status of a workspace means for its run. Pure.

use kiln_domain::failure::{Failure, FailureReason};
use kiln_domain::id::RunId;
use kiln_proto::wsman::{WorkspaceConditionBool, WorkspaceConditions, WorkspacePhase, WorkspaceStatus};

/// Of every workspace that builds an image: what the old service and we tell ours by.
pub(crate) const MANAGED_BY: (&str, &str) = ("managed-by", "image-builder");
/// The annotations that say what is made.
pub(crate) const TARGET: &str = "ref";
pub(crate) const BASE: &str = "baseref";

/// A workspace, as far as a run is concerned.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct State {
    /// Grows with every change.
    pub(crate) version: u64,
    /// The target reference; empty where it isn't told.
    pub(crate) target: String,
    /// Where its supervisor is; empty as long as it isn't told.
    pub(crate) url: String,
    /// A secret.
    pub(crate) owner_token: String,
    /// Once nothing of it can push any more.
    pub(crate) end: Option<End>,
    /// How it will have ended, if it vanishes before it is seen stopped.
    pub(crate) so_far: Option<Failure>,
}

/// How a workspace ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// Its task ended without an error, or so it seems: what lies in the registry decides.
    Well,
    Failed(Failure),
    /// It is not known, or was nobody's doing that builds.
    Lost,
}

impl State {
    pub(crate) fn of(status: &WorkspaceStatus) -> Self {
        let annotation = |name: &str| {
            status
                .metadata
                .as_ref()
                .and_then(|metadata| metadata.annotations.get(name))
                .cloned()
                .unwrap_or_default()
        };
        let conditions = status.conditions.clone().unwrap_or_default();
        let why = why(&conditions);
        // STOPPING is no end: it may still push, and how it ended may come with the next status.
        let stopped = status.phase() == WorkspacePhase::Stopped;
        Self {
            version: status.status_version,
            target: annotation(TARGET),
            url: status.spec.as_ref().map(|spec| spec.url.clone()).unwrap_or_default(),
            owner_token: status.auth.as_ref().map(|auth| auth.owner_token.clone()).unwrap_or_default(),
            end: stopped.then(|| end(why.clone(), &conditions)),
            so_far: why,
        }
    }

    /// What is known after a further status: nothing goes back, and what it leaves out stays.
    pub(crate) fn then(&self, newer: Self) -> Self {
        if self.end.is_some() || (newer.version < self.version && newer.version != 0) {
            return self.clone();
        }
        let kept = |newer: String, older: &String| if newer.is_empty() { older.clone() } else { newer };
        let so_far = newer.so_far.or_else(|| self.so_far.clone());
        let end = match (newer.end, &so_far) {
            // The reason was told before, and isn't any more.
            (Some(End::Well | End::Lost), Some(failure)) => Some(End::Failed(failure.clone())),
            (end, _) => end,
        };
        Self {
            version: newer.version.max(self.version),
            target: kept(newer.target, &self.target),
            url: kept(newer.url, &self.url),
            owner_token: kept(newer.owner_token, &self.owner_token),
            end,
            so_far,
        }
    }

    /// It was there, and is gone.
    pub(crate) fn vanished(&self) -> Self {
        let end = self.so_far.clone().map_or(End::Lost, End::Failed);
        Self { end: Some(self.end.clone().unwrap_or(end)), ..self.clone() }
    }
}

/// Whether a workspace is a run of ours; one that the old service started has an id of another form.
pub(crate) fn run_of(status: &WorkspaceStatus) -> Option<RunId> {
    status.id.parse().ok()
}

fn why(conditions: &WorkspaceConditions) -> Option<Failure> {
    let told = |text: &str| !text.is_empty();
    if told(&conditions.headless_task_failed) {
        return Some(Failure::new(FailureReason::Dockerfile, conditions.headless_task_failed.clone()));
    }
    if told(&conditions.timeout) {
        let message = format!("the workspace took too long: {}", conditions.timeout);
        return Some(Failure::new(FailureReason::Timeout, message));
    }
    if told(&conditions.failed) {
        let message = format!("the workspace failed: {}", conditions.failed);
        return Some(Failure::new(FailureReason::Internal, message));
    }
    if conditions.stopped_by_request() == WorkspaceConditionBool::True {
        let message = "the workspace was stopped by somebody's request".to_owned();
        return Some(Failure::new(FailureReason::EngineLost, message));
    }
    None
}

fn end(why: Option<Failure>, conditions: &WorkspaceConditions) -> End {
    match why {
        Some(failure) => End::Failed(failure),
        None if conditions.aborted() == WorkspaceConditionBool::True => End::Lost,
        None => End::Well,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(phase: WorkspacePhase, version: u64, conditions: WorkspaceConditions) -> WorkspaceStatus {
        let mut status =
            WorkspaceStatus { status_version: version, conditions: Some(conditions), ..Default::default() };
        status.set_phase(phase);
        status
    }

    fn conditions(change: impl FnOnce(&mut WorkspaceConditions)) -> WorkspaceConditions {
        let mut conditions = WorkspaceConditions::default();
        change(&mut conditions);
        conditions
    }

    #[test]
    fn every_condition_has_its_reason() {
        use FailureReason::{Dockerfile, EngineLost, Internal, Timeout};
        let truth = WorkspaceConditionBool::True;
        for (conditions, expected) in [
            (conditions(|_| {}), Ok(End::Well)),
            (conditions(|c| c.headless_task_failed = "headless task failed: exit 1".into()), Err(Dockerfile)),
            (conditions(|c| c.timeout = "1h0m0s".into()), Err(Timeout)),
            (conditions(|c| c.failed = "cannot pull".into()), Err(Internal)),
            (conditions(|c| c.set_stopped_by_request(truth)), Err(EngineLost)),
            (conditions(|c| c.set_aborted(truth)), Ok(End::Lost)),
            // The task's own words say more than what followed from them.
            (
                conditions(|c| {
                    c.headless_task_failed = "headless task failed: exit 1".into();
                    c.failed = "task failed".into();
                    c.set_stopped_by_request(truth);
                }),
                Err(Dockerfile),
            ),
        ] {
            let shown = format!("{conditions:?}");
            let end = State::of(&status(WorkspacePhase::Stopped, 1, conditions.clone())).end;
            match (end, expected) {
                (Some(End::Failed(failure)), Err(reason)) => assert_eq!(failure.reason, reason, "{shown}"),
                (end, expected) => assert_eq!(end, expected.ok(), "{shown}"),
            }
            for phase in [WorkspacePhase::Running, WorkspacePhase::Stopping, WorkspacePhase::Unknown] {
                assert_eq!(State::of(&status(phase, 1, conditions.clone())).end, None, "{phase:?}: {shown}");
            }
        }
    }

    #[test]
    fn a_status_never_goes_back_and_what_it_leaves_out_stays() {
        let failed = conditions(|c| c.headless_task_failed = "headless task failed: exit 1".into());
        let stopping = State::of(&status(WorkspacePhase::Stopping, 5, failed));
        let stopped = State::of(&status(WorkspacePhase::Stopped, 6, WorkspaceConditions::default()));
        let known = State { url: "https://x".into(), ..stopping.clone() };
        let ended = known.then(stopped.clone());
        assert!(
            matches!(&ended.end, Some(End::Failed(failure)) if failure.reason == FailureReason::Dockerfile)
        );
        assert_eq!(ended.url, "https://x");
        // Late, and of what was before.
        let running = State::of(&status(WorkspacePhase::Running, 7, WorkspaceConditions::default()));
        assert_eq!(ended.then(running.clone()), ended, "an end is an end");
        assert_eq!(State { version: 9, ..known.clone() }.then(running).version, 9);
        assert_eq!(stopping.vanished().end, ended.end);
        assert_eq!(State::default().vanished().end, Some(End::Lost));
    }

    #[test]
    fn a_status_with_parts_missing_is_taken() {
        assert_eq!(State::of(&WorkspaceStatus::default()), State::default());
        assert_eq!(
            run_of(&WorkspaceStatus {
                id: "9e3c1f5a-0000-4000-8000-0123456789ab".into(),
                ..Default::default()
            }),
            None
        );
    }
}
