//! Which change of a build is legal from which record. Pure and total: an illegal change is an error.

use crate::engine::Handle;
use crate::failure::{Failure, FailureReason};
use crate::id::InstanceId;
use crate::limits;
use crate::record::{Record, State};
use crate::reference::Digest;
use crate::run::{Base, Findings};

/// One change of a build: what an event of the journal says happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Accepted. The record is new.
    Queued(Box<Record>),
    /// An instance acts on it now, first or after another.
    Claimed {
        by: InstanceId,
    },
    /// The holder's engine runs a builder for it.
    Started {
        by: InstanceId,
        handle: Handle,
        engine: String,
        /// What the builder executes the Dockerfile with; empty where that is known only later, or nothing is executed.
        build_tool: String,
    },
    /// The holder must stop it.
    CancelRequested {
        reason: String,
    },
    /// A holder lets go; no attempt is counted. It is asked to end, or it can't start the builder: then `why` is what the
    /// engine said, and the next holder waits a while (see [`Record::not_before`]).
    Released {
        by: InstanceId,
        why: Option<String>,
    },
    /// The builder was lost; the attempt that follows.
    Retrying {
        by: InstanceId,
        why: String,
    },
    /// A further owner waits for it, or a further request was answered with it.
    Joined {
        owner: String,
        request: String,
    },
    Succeeded {
        by: InstanceId,
        digest: Digest,
        findings: Findings,
    },
    /// `by` is absent for a build that nobody ever claimed and whose time in the queue is up.
    Failed {
        by: Option<InstanceId>,
        failure: Failure,
        findings: Findings,
    },
    /// `by` is absent for a build that nobody ever claimed.
    Cancelled {
        by: Option<InstanceId>,
        findings: Findings,
    },
}

impl Change {
    /// The event's name: the last token of its subject.
    pub fn event(&self) -> &'static str {
        match self {
            Self::Queued(_) => "queued",
            Self::Claimed { .. } => "claimed",
            Self::Started { .. } => "started",
            Self::CancelRequested { .. } => "cancel_requested",
            Self::Released { .. } => "released",
            Self::Retrying { .. } => "retrying",
            Self::Joined { .. } => "joined",
            Self::Succeeded { .. } => "succeeded",
            Self::Failed { .. } => "failed",
            Self::Cancelled { .. } => "cancelled",
        }
    }
}

/// Every event's name.
pub const EVENTS: [&str; 10] = [
    "queued",
    "claimed",
    "started",
    "cancel_requested",
    "released",
    "retrying",
    "joined",
    "succeeded",
    "failed",
    "cancelled",
];

/// A change that the rules don't allow from a record.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Illegal {
    #[error("`{event}` needs a build, and there is none")]
    NoBuild { event: &'static str },
    #[error("the image has an active build already")]
    Active,
    #[error("`{event}` can't follow the end of a build ({state})")]
    Over { event: &'static str, state: State },
    #[error("`{event}` is for the holder, and that is not the one who tries")]
    NotHolder { event: &'static str },
    #[error("`{event}` can't be appended by this release: the build's state is of a newer one")]
    NewerState { event: &'static str },
    #[error("`{event}` can't be: {why}")]
    Refused { event: &'static str, why: &'static str },
}

/// The record after `change`, given the last record of the image (of another, finished build for `Queued`).
pub fn apply(before: Option<&Record>, change: &Change) -> Result<Record, Illegal> {
    let event = change.event();
    if let Change::Queued(new) = change {
        return match before {
            Some(last) if last.state == State::Unknown => Err(Illegal::NewerState { event }),
            Some(last) if !last.state.is_terminal() => Err(Illegal::Active),
            Some(last) if last.id == new.id => Err(Illegal::Refused { event, why: "the id was used before" }),
            _ if !is_new(new) => {
                Err(Illegal::Refused { event, why: "the record is not that of a new build" })
            }
            _ => Ok((**new).clone()),
        };
    }
    let before = before.ok_or(Illegal::NoBuild { event })?;
    if before.state == State::Unknown {
        return Err(Illegal::NewerState { event });
    }
    if before.state.is_terminal() {
        return Err(Illegal::Over { event, state: before.state });
    }
    let holds = |by: &InstanceId| before.claimed_by.as_ref() == Some(by);
    let only_holder = |by: &InstanceId| if holds(by) { Ok(()) } else { Err(Illegal::NotHolder { event }) };
    let holder_or_unclaimed = |by: &Option<InstanceId>| match by {
        Some(by) => only_holder(by),
        None if before.claims == 0 => Ok(()),
        None => Err(Illegal::NotHolder { event }),
    };
    let refuse = |why| Err(Illegal::Refused { event, why });
    let mut after = before.clone();
    match change {
        Change::Queued(_) => return Err(Illegal::Active),
        Change::Claimed { by } => {
            if holds(by) {
                return refuse("it has the claim already");
            }
            after.claimed_by = Some(by.clone());
            after.claims += 1;
        }
        Change::Started { by, handle, engine, build_tool } => {
            only_holder(by)?;
            if before.handle.is_some() {
                return refuse("this attempt was started before");
            }
            if before.cancel.is_some() {
                return refuse("a cancel was requested");
            }
            after.state = State::Running;
            after.handle = Some(handle.clone());
            after.engine.clone_from(engine);
            after.build_tool.clone_from(build_tool);
            after.message.clear();
            after.refused_starts = 0;
        }
        Change::CancelRequested { reason } => {
            if before.cancel.is_some() {
                return refuse("a cancel was requested before");
            }
            after.cancel = Some(limits::truncated(reason.clone(), limits::MESSAGE_BYTES));
        }
        Change::Released { by, why } => {
            only_holder(by)?;
            if why.is_some() && before.handle.is_some() {
                return refuse("its builder was started");
            }
            after.claimed_by = None;
            match why {
                Some(why) => {
                    after.refused_starts = before.refused_starts.saturating_add(1);
                    after.message = limits::truncated(why.clone(), limits::MESSAGE_BYTES);
                }
                None => after.refused_starts = 0,
            }
        }
        Change::Retrying { by, why } => {
            only_holder(by)?;
            if before.cancel.is_some() {
                return refuse("a cancel was requested");
            }
            if before.attempt >= limits::ATTEMPTS {
                return refuse("no attempt is left");
            }
            after.attempt += 1;
            after.handle = None;
            after.attempt_started_at = None;
            after.refused_starts = 0;
            after.message = limits::truncated(why.clone(), limits::MESSAGE_BYTES);
        }
        Change::Joined { owner, request } => {
            let known = before.owners().any(|known| known == owner);
            if !known && after.joined_by.len() < limits::OWNERS {
                after.joined_by.push(owner.clone());
            }
            if !request.is_empty() && !before.requests.contains(request) {
                after.requests.push(request.clone());
                if after.requests.len() > limits::REQUESTS {
                    // Never the first: it is the one that made the build.
                    after.requests.remove(1);
                }
            }
        }
        Change::Succeeded { by, digest, findings } => {
            only_holder(by)?;
            end(&mut after, State::Succeeded, findings);
            after.digest = Some(digest.clone());
            after.message.clear();
        }
        Change::Failed { by, failure, findings } => {
            holder_or_unclaimed(by)?;
            if by.is_none() && failure.reason != FailureReason::QueueExpired {
                return refuse("an unclaimed build fails only for its time in the queue");
            }
            end(&mut after, State::Failed, findings);
            after.reason = Some(failure.reason);
            after.message = limits::truncated(failure.message.clone(), limits::MESSAGE_BYTES);
        }
        Change::Cancelled { by, findings } => {
            holder_or_unclaimed(by)?;
            if by.is_some() && before.cancel.is_none() {
                return refuse("no cancel was requested");
            }
            end(&mut after, State::Cancelled, findings);
            after.message = before.cancel.clone().unwrap_or_default();
        }
    }
    Ok(after)
}

fn is_new(record: &Record) -> bool {
    record.state == State::Queued
        && record.attempt == 1
        && record.claims == 0
        && record.claimed_by.is_none()
        && record.handle.is_none()
        && record.cancel.is_none()
}

fn end(record: &mut Record, state: State, findings: &Findings) {
    record.state = state;
    record.claimed_by = None;
    record.steps = findings.steps.iter().take(limits::STEPS).cloned().collect();
    for step in &mut record.steps {
        step.name = limits::truncated(std::mem::take(&mut step.name), limits::NAME_BYTES);
    }
    record.bases = findings
        .bases
        .iter()
        .take(limits::BASES)
        .map(|base| Base {
            reference: limits::truncated(base.reference.clone(), limits::NAME_BYTES),
            digest: base.digest.clone(),
        })
        .collect();
    record.images = findings.images.iter().take(limits::PLATFORMS).cloned().collect();
    if !findings.build_tool.is_empty() {
        record.build_tool.clone_from(&findings.build_tool);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::id::{BuildId, ImageKey};
    use crate::source::Source;

    fn queued() -> Record {
        let id = BuildId::new(&ImageKey::of("r/t:x"), [1; 10]);
        let source = Source::Image("r/s:1".parse().unwrap());
        Record {
            base_exists: true,
            timeout_ms: 1000,
            queue_limit_ms: 1000,
            ..Record::accepted(id, "r/t:x".into(), "r/b:x".into(), source, "ann".into())
        }
    }

    fn holder(n: u64) -> InstanceId {
        InstanceId::new("o", n).unwrap()
    }

    fn change() -> impl Strategy<Value = Change> {
        let by = (0u64..2).prop_map(holder);
        let maybe = proptest::option::of(by.clone());
        let findings = Findings::default();
        let reason = prop_oneof![Just(FailureReason::QueueExpired), Just(FailureReason::Dockerfile)];
        prop_oneof![
            Just(Change::Queued(Box::new(queued()))),
            by.clone().prop_map(|by| Change::Claimed { by }),
            by.clone().prop_map(|by| Change::Started {
                by,
                handle: Handle::new("h"),
                engine: "local".into(),
                build_tool: String::new(),
            }),
            Just(Change::CancelRequested { reason: "enough".into() }),
            (by.clone(), proptest::option::of(Just("no room".to_owned())))
                .prop_map(|(by, why)| Change::Released { by, why }),
            by.clone().prop_map(|by| Change::Retrying { by, why: "lost".into() }),
            "[a-c]".prop_map(|owner| Change::Joined { owner, request: String::new() }),
            by.prop_map({
                let findings = findings.clone();
                move |by| Change::Succeeded { by, digest: Digest::of(b"x"), findings: findings.clone() }
            }),
            (maybe.clone(), reason).prop_map({
                let findings = findings.clone();
                move |(by, reason)| Change::Failed {
                    by,
                    failure: Failure::new(reason, "no"),
                    findings: findings.clone(),
                }
            }),
            maybe.prop_map(move |by| Change::Cancelled { by, findings: findings.clone() }),
        ]
    }

    proptest! {
        /// Whatever is tried in whatever order: one end, attempts within their bound, and only the holder acts.
        #[test]
        fn every_history_keeps_the_rules(changes in proptest::collection::vec(change(), 0..60)) {
            let mut record: Option<Record> = None;
            for change in changes {
                let Ok(after) = apply(record.as_ref(), &change) else { continue };
                if let Some(before) = &record {
                    prop_assert!(!before.state.is_terminal(), "{} followed the end", change.event());
                    prop_assert!(after.attempt >= before.attempt && after.claims >= before.claims);
                    prop_assert!(before.cancel.is_none() || after.cancel == before.cancel);
                    let acts = matches!(change, Change::Started { .. } | Change::Retrying { .. }
                        | Change::Succeeded { .. } | Change::Released { .. });
                    prop_assert!(!acts || before.claimed_by.is_some());
                    let starts = matches!(change, Change::Started { .. } | Change::Retrying { .. });
                    prop_assert!(before.cancel.is_none() || !starts);
                }
                prop_assert!(after.attempt <= limits::ATTEMPTS);
                prop_assert_eq!(after.state == State::Succeeded, after.digest.is_some());
                prop_assert_eq!(after.state == State::Failed, after.reason.is_some());
                prop_assert!(!(after.state.is_terminal() && after.claimed_by.is_some()));
                record = Some(after);
            }
        }
    }

    #[test]
    fn a_build_that_was_never_claimed_may_be_ended_by_anybody_and_no_other() {
        let build = queued();
        let cancelled = Change::Cancelled { by: None, findings: Findings::default() };
        assert_eq!(apply(Some(&build), &cancelled).unwrap().state, State::Cancelled);
        let claimed = apply(Some(&build), &Change::Claimed { by: holder(1) }).unwrap();
        let released = apply(Some(&claimed), &Change::Released { by: holder(1), why: None }).unwrap();
        assert_eq!(apply(Some(&released), &cancelled), Err(Illegal::NotHolder { event: "cancelled" }));
    }

    #[test]
    fn a_record_carries_what_a_newer_release_wrote() {
        let mut json = serde_json::to_value(queued()).unwrap();
        json["of_tomorrow"] = serde_json::json!({"a": 1});
        let record: Record = serde_json::from_value(json.clone()).unwrap();
        let after = apply(Some(&record), &Change::Claimed { by: holder(1) }).unwrap();
        assert_eq!(serde_json::to_value(after).unwrap()["of_tomorrow"], json["of_tomorrow"]);
    }
}
