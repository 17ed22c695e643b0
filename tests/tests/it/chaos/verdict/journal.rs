//! Every change in the journal was legal, and every build came to one end.

use std::collections::BTreeMap;

use kiln_contract::event::cloudevents_source;
use kiln_domain::failure::Failure;
use kiln_domain::id::{ImageKey, InstanceId};
use kiln_domain::record::Record;
use kiln_domain::run::Findings;
use kiln_domain::transition::{Change, Illegal, apply};
use kiln_testkit::streams::Event;

use super::Problem;

pub(super) fn check(events: &[Event]) -> Vec<Problem> {
    let mut problems = Vec::new();
    let mut histories: BTreeMap<ImageKey, Option<Record>> = BTreeMap::new();
    for event in events {
        let before = histories.entry(event.build.image_key()).or_default();
        if let Err(why) = follows(before.as_ref(), event) {
            problems
                .push(Problem::of(&event.build, format!("`{}` at {}: {why}", event.name, event.sequence)));
        }
        *before = Some(event.record.clone().at(&event.name, event.stored_at));
    }
    // An image's builds follow one another, each after the end of the last (that is a rule of `apply`): so if the last is over,
    // all are.
    for record in histories.into_values().flatten().filter(|record| !record.state.is_terminal()) {
        problems.push(Problem::of(&record.id, format!("it never ended: {}", record.state)));
    }
    problems
}

/// Whether the event is what a legal change by its own author makes of the record before.
fn follows(before: Option<&Record>, event: &Event) -> Result<(), String> {
    let change = change(before, event)?;
    let asked = asked_and_done(before, event).transpose().map_err(|illegal| illegal.to_string())?;
    let expected = apply(asked.as_ref().or(before), &change).map_err(|illegal| illegal.to_string())?;
    if expected == event.record {
        Ok(())
    } else {
        Err(format!("the record should be {expected:?}, and is {:?}", event.record))
    }
}

/// Of a build that was never claimed one event says both: that a cancel was asked for, and that it is done. The record between.
fn asked_and_done(before: Option<&Record>, event: &Event) -> Option<Result<Record, Illegal>> {
    let asked = before.filter(|before| before.claims == 0 && event.name == "cancelled")?;
    let reason = event.record.cancel.clone().unwrap_or_default();
    Some(apply(Some(asked), &Change::CancelRequested { reason }))
}

/// The change that an event tells of.
fn change(before: Option<&Record>, event: &Event) -> Result<Change, String> {
    let after = &event.record;
    if event.name == "queued" {
        return Ok(Change::Queued(Box::new(after.clone())));
    }
    let before = before.ok_or("there is no build")?;
    let by: InstanceId = event
        .source
        .strip_prefix(&cloudevents_source(""))
        .and_then(|instance| instance.parse().ok())
        .ok_or_else(|| format!("by `{}`", event.source))?;
    let claimed = (before.claims > 0).then(|| by.clone());
    let message = after.message.clone();
    let findings = Findings {
        steps: after.steps.clone(),
        bases: after.bases.clone(),
        images: after.images.clone(),
        build_tool: after.build_tool.clone(),
    };
    Ok(match event.name.as_str() {
        "claimed" => Change::Claimed { by },
        "started" => Change::Started {
            by,
            handle: after.handle.clone().ok_or("it has no handle")?,
            engine: after.engine.clone(),
            build_tool: after.build_tool.clone(),
        },
        "cancel_requested" => Change::CancelRequested { reason: after.cancel.clone().unwrap_or_default() },
        "released" => Change::Released { by, why: (after.refused_starts > 0).then_some(message) },
        "retrying" => Change::Retrying { by, why: message },
        "joined" => Change::Joined {
            owner: after.joined_by.last().unwrap_or(&after.owner).clone(),
            request: after.requests.last().cloned().unwrap_or_default(),
        },
        "succeeded" => {
            Change::Succeeded { by, digest: after.digest.clone().ok_or("it has no digest")?, findings }
        }
        "failed" => {
            let failure = Failure::new(after.reason.ok_or("it has no reason")?, message);
            Change::Failed { by: claimed, failure, findings }
        }
        "cancelled" => Change::Cancelled { by: claimed, findings },
        other => return Err(format!("nobody knows of `{other}`")),
    })
}

#[cfg(test)]
mod tests {
    use kiln_domain::engine::Handle;
    use kiln_domain::reference::Digest;
    use kiln_testkit::records::queued;

    use super::*;

    fn holder(number: u64) -> InstanceId {
        InstanceId::new("o", number).unwrap()
    }

    /// The events that changes make, appended by these.
    fn history(changes: Vec<(u64, Change)>) -> Vec<Event> {
        let mut events: Vec<Event> = Vec::new();
        for (sequence, (by, change)) in (1..).zip(changes) {
            let before = events.last().map(|event| event.record.clone().at(&event.name, event.stored_at));
            let record = apply(before.as_ref(), &change).unwrap();
            events.push(Event {
                sequence,
                stored_at: jiff::Timestamp::from_second(sequence as i64).unwrap(),
                build: record.id.clone(),
                name: change.event().to_owned(),
                source: cloudevents_source(holder(by).as_str()),
                record,
            });
        }
        events
    }

    fn whole() -> Vec<Event> {
        let (one, two) = (holder(1), holder(2));
        history(vec![
            (1, Change::Queued(Box::new(queued("x", [1; 10]).unwrap()))),
            (1, Change::Claimed { by: one.clone() }),
            (
                1,
                Change::Started {
                    by: one.clone(),
                    handle: Handle::new("h"),
                    engine: "local".into(),
                    build_tool: String::new(),
                },
            ),
            (2, Change::Joined { owner: "ben".into(), request: "r".into() }),
            (1, Change::Released { by: one, why: None }),
            (2, Change::Claimed { by: two.clone() }),
            (2, Change::Retrying { by: two.clone(), why: "lost".into() }),
            (1, Change::CancelRequested { reason: "enough".into() }),
            (2, Change::Succeeded { by: two, digest: Digest::of(b"x"), findings: Findings::default() }),
        ])
    }

    #[test]
    fn a_build_that_waits_is_cancelled_by_one_event() {
        let record = queued("x", [1; 10]).unwrap();
        let mut events = history(vec![
            (1, Change::Queued(Box::new(record.clone()))),
            (1, Change::Cancelled { by: None, findings: Findings::default() }),
        ]);
        events[1].record.cancel = Some("enough".into());
        events[1].record.message = "enough".into();
        assert!(check(&events).is_empty());
        events[1].record.message = "something else".into();
        assert!(!check(&events).is_empty());
    }

    #[test]
    fn what_breaks_a_rule_is_seen() {
        let problems =
            |events: &[Event]| check(events).into_iter().map(|problem| problem.text).collect::<Vec<_>>();
        assert_eq!(problems(&whole()), Vec::<String>::new());
        let broken = |what: &str, breaks: fn(&mut Vec<Event>)| {
            let mut events = whole();
            breaks(&mut events);
            assert!(!problems(&events).is_empty(), "{what} was not seen");
        };
        broken("a second end", |events| events.push(events[8].clone()));
        broken("no end", |events| drop(events.pop()));
        broken("an end by another than the holder", |events| {
            events[8].source = cloudevents_source(holder(1).as_str());
        });
        broken("an event that is missing", |events| drop(events.remove(5)));
        broken("a change of what may not change", |events| events[3].record.timeout_ms += 1);
        broken("a new build that isn't", |events| events[0].record.attempt = 2);
    }
}
