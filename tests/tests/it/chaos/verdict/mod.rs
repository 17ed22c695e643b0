//! What must be true when all is over.

mod images;
mod journal;
mod leftovers;
mod logs;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::Result;
use kiln_contract::subject;
use kiln_domain::failure::FailureReason;
use kiln_domain::id::{BuildId, RunId};
use kiln_domain::record::Record;
use kiln_testkit::streams::{self, Event};
use tokio::time::{Instant, sleep};

pub(super) use self::leftovers::cleaned_up;

use super::callers::{Answer, Seen};
use super::faults::Done;
use super::plan::Plan;
use super::sources::SECRET_BEGINS;
use super::world::World;

/// How long other subscribers may have to wait for the last events.
const MIRRORED: Duration = Duration::from_secs(60);

/// What is known after a run.
pub(super) struct Evidence<'a> {
    pub(super) world: &'a World,
    pub(super) plan: &'a Plan,
    pub(super) seen: &'a [Seen],
    pub(super) done: &'a Done,
    pub(super) outputs: BTreeMap<RunId, Vec<u8>>,
    /// The journal, whole.
    events: Vec<Event>,
    /// Each build's record after its last event.
    records: BTreeMap<BuildId, Record>,
}

/// Something that isn't as it must be.
pub(super) struct Problem {
    build: Option<BuildId>,
    text: String,
}

impl Problem {
    fn of(build: &BuildId, text: impl Into<String>) -> Self {
        Self { build: Some(build.clone()), text: text.into() }
    }

    pub(super) fn new(text: impl Into<String>) -> Self {
        Self { build: None, text: text.into() }
    }
}

impl<'a> Evidence<'a> {
    pub(super) async fn gather(
        world: &'a World,
        plan: &'a Plan,
        seen: &'a [Seen],
        done: &'a Done,
        outputs: BTreeMap<RunId, Vec<u8>>,
    ) -> Result<Self> {
        let events = streams::events(world.nodes_url(), subject::JOURNAL_STREAM).await?;
        let records = events
            .iter()
            .map(|event| (event.build.clone(), event.record.clone().at(&event.name, event.stored_at)))
            .collect();
        Ok(Self { world, plan, seen, done, outputs, events, records })
    }

    /// Everything that is wrong.
    pub(super) async fn problems(&self) -> Result<Vec<Problem>> {
        let mut problems = journal::check(&self.events);
        problems.extend(self.mirror().await?);
        problems.extend(self.answers());
        problems.extend(self.lost_for_no_cause());
        problems.extend(self.secrets()?);
        problems.extend(images::check(self).await?);
        problems.extend(logs::check(self).await?);
        Ok(problems)
    }

    /// Other subscribers come to see what the journal holds. A mirror whose leader has changed may stand still until it is seen to.
    async fn mirror(&self) -> Result<Option<Problem>> {
        let journal: BTreeSet<_> = self.events.iter().map(|event| event.sequence).collect();
        let since = Instant::now();
        loop {
            let mirror = streams::events(self.world.nodes_url(), subject::EVENTS_STREAM).await?;
            let mirror: BTreeSet<_> = mirror.iter().map(|event| event.sequence).collect();
            if mirror == journal {
                eprintln!("chaos: the mirror has it all after {:?}", since.elapsed());
                return Ok(None);
            }
            if since.elapsed() > MIRRORED {
                let missing: Vec<_> = journal.difference(&mirror).collect();
                let text = format!("the mirror of {} events lacks {missing:?}", journal.len());
                return Ok(Some(Problem::new(text)));
            }
            sleep(Duration::from_secs(1)).await;
        }
    }

    /// No secret is in the journal, nor in what the roles said. (Logs are compared with what they must be.)
    fn secrets(&self) -> Result<Vec<Problem>> {
        let mut problems = Vec::new();
        for event in &self.events {
            if serde_json::to_string(&event.record)?.contains(SECRET_BEGINS) {
                problems.push(Problem::of(&event.build, format!("`{}` tells its secret", event.name)));
            }
        }
        for (name, said) in self.world.said()? {
            if said.contains(SECRET_BEGINS) {
                problems.push(Problem::new(format!("{name} tells a secret")));
            }
        }
        Ok(problems)
    }

    /// What a caller was told stands.
    fn answers(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        for Seen { request, answer } in self.seen {
            let Answer::Build { last, .. } = answer else { continue };
            let told = last.id.parse::<BuildId>().ok().and_then(|id| self.records.get(&id));
            let stands =
                told.is_some_and(|record| last.state().as_str_name().ends_with(record.state.as_str()));
            if !stands {
                let text = format!("request {request} was told of {last:?}, and the journal has {told:?}");
                problems.push(Problem::new(text));
            }
        }
        problems
    }

    /// No more builders were lost than we befell: whatever happens to roles, bus and registry, they run on.
    fn lost_for_no_cause(&self) -> Option<Problem> {
        let retried = self.events.iter().filter(|event| event.name == "retrying").count();
        let given_up =
            self.records.values().filter(|record| record.reason == Some(FailureReason::EngineLost)).count();
        let befallen = Done::count(&self.done.builders);
        (retried + given_up > befallen).then(|| {
            Problem::new(format!(
                "{retried} builders lost and tried again, {given_up} given up, {befallen} befallen"
            ))
        })
    }

    /// Some figures of what happened.
    pub(super) fn summary(&self) -> String {
        let mut counts: BTreeMap<String, usize> = BTreeMap::new();
        for event in &self.events {
            *counts.entry(event.name.clone()).or_default() += 1;
        }
        for record in self.records.values() {
            if let Some(reason) = record.reason {
                *counts.entry(format!("failed for {reason}")).or_default() += 1;
            }
        }
        let joined =
            self.seen.iter().filter(|seen| matches!(seen.answer, Answer::Build { joined: true, .. }));
        let already = self.seen.iter().filter(|seen| matches!(seen.answer, Answer::AlreadyBuilt(_)));
        let bytes: usize = self.outputs.values().map(Vec::len).sum();
        format!(
            "{} requests: {} builds, {} joined, {} already built; {} runs wrote {} KiB; events: {counts:?}",
            self.seen.len(),
            self.records.len(),
            joined.count(),
            already.count(),
            self.outputs.len(),
            bytes >> 10
        )
    }

    /// A problem with the history of its build, for whoever looks into it.
    pub(super) fn report(&self, problem: &Problem) -> String {
        let mut report = problem.text.clone();
        let Some(id) = &problem.build else { return report };
        report = format!("build {id}: {report}");
        for event in self.events.iter().filter(|event| event.build.image_key() == id.image_key()) {
            let Record { attempt, claimed_by, cancel, digest, reason, message, .. } = &event.record;
            report.push_str(&format!(
                "\n    {} {} {} {} by {}: attempt {attempt}, holder {claimed_by:?}, cancel {cancel:?}, digest {digest:?}, reason {reason:?} {message:?}",
                event.sequence, event.stored_at, event.build, event.name, event.source,
            ));
        }
        report
    }
}
