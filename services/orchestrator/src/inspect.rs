//! An examination of the builds that aren't done with: is each in somebody's hands, within its time, and cleaned up.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use jiff::Timestamp;
use kiln_bus::journal::{Entry, Journal};
use kiln_bus::seal::OpenKey;
use kiln_bus::secrets::SecretsBucket;
use kiln_bus::{Bus, BusError};
use kiln_domain::finding::{Finding, spoken};
use kiln_domain::id::{BuildId, InstanceId};
use kiln_domain::record::State;

/// A holder that died is followed by another within 45 s.
const TAKE_OVER: Duration = Duration::from_secs(60);
/// A builder minds its deadline itself, and its holder sees to it a little later.
const PAST_DEADLINE: Duration = Duration::from_secs(120);
/// A build that is over is cleaned up within seconds, once its log is complete.
const CLEANED_UP: Duration = Duration::from_secs(10 * 60);
/// So many are looked at; each costs a question.
const LOOKED_AT: usize = 5_000;

const BUILDS: &str = "builds";
const CLEANING: &str = "cleaning up";

/// The builds that are not cleaned up, and others that were asked for, as the journal has them.
pub struct Builds {
    known: BTreeMap<BuildId, Option<Entry>>,
    /// Those with an entry in `KILN_SECRETS`, and since when.
    to_clean: BTreeMap<BuildId, Timestamp>,
    /// So many were not looked at.
    left_out: usize,
    /// Why the journal takes no further build.
    full: Option<String>,
}

/// What the journal says of a build.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It waits or runs.
    Active,
    Over {
        since: Timestamp,
    },
    /// The journal doesn't know it.
    Unknown,
}

impl Builds {
    /// Reads them from the bus; of `others` too how they stand.
    pub async fn read(bus: &Bus, others: impl IntoIterator<Item = BuildId>) -> Result<Self, BusError> {
        let (journal, secrets) = (Journal::open(bus).await?, SecretsBucket::open(bus).await?);
        let mut listed = secrets.builds().await?;
        let left_out = listed.len().saturating_sub(LOOKED_AT);
        listed.truncate(LOOKED_AT);
        let mut to_clean = BTreeMap::new();
        for id in &listed {
            if let Some(since) = secrets.since(id).await? {
                to_clean.insert(id.clone(), since);
            }
        }
        let ids: BTreeSet<BuildId> = listed.into_iter().chain(others).collect();
        let mut known = BTreeMap::new();
        for id in ids {
            let entry = journal.last_of_build(&id).await?;
            known.insert(id, entry);
        }
        let active = known.values().flatten().filter(|entry| !entry.record.state.is_terminal()).count();
        let full = journal.refuses(active.saturating_add(left_out)).await?;
        Ok(Self { known, to_clean, left_out, full })
    }

    /// How a build stands; `None` for one that was neither found nor asked for.
    pub fn standing(&self, id: &BuildId) -> Option<Standing> {
        self.known.get(id).map(|entry| match entry {
            None => Standing::Unknown,
            Some(entry) if entry.record.state.is_terminal() => {
                Standing::Over { since: entry.record.finished_at.unwrap_or(entry.stored_at) }
            }
            Some(_) => Standing::Active,
        })
    }

    /// Whether it is among those that orchestrators clean up, once they are over.
    pub fn is_to_clean(&self, id: &BuildId) -> bool {
        self.to_clean.contains_key(id)
    }

    /// What is to be said of them. `live`: who holds a lease.
    pub fn findings(&self, live: &BTreeSet<InstanceId>, now: Timestamp) -> Vec<Finding> {
        let active: Vec<&Entry> =
            self.known.values().flatten().filter(|entry| !entry.record.state.is_terminal()).collect();
        let mut findings = Vec::new();
        let remedy = "raise `streams.journal_max_bytes` for every role and restart one, or lower `orchestrator.max_queued`";
        findings.extend(self.full.clone().map(|full| Finding::problem(BUILDS, full, remedy)));
        for entry in &active {
            findings.extend(of_active(entry, live, now));
        }
        if findings.is_empty() {
            findings.push(Finding::ok(BUILDS, self.summary(&active, now)));
        }
        findings.extend(self.uncleaned(now));
        findings
    }

    fn summary(&self, active: &[&Entry], now: Timestamp) -> String {
        let (running, waiting): (Vec<&Entry>, Vec<&Entry>) =
            active.iter().partition(|entry| entry.record.state == State::Running);
        let oldest = waiting.iter().filter_map(|entry| entry.record.queued_at).min();
        let oldest =
            oldest.map_or_else(String::new, |at| format!(", the oldest for {}", spoken(since(at, now))));
        let more = if self.left_out > 0 {
            format!("; {} more were not looked at", self.left_out)
        } else {
            String::new()
        };
        format!("{} run, {} wait{oldest}{more}", running.len(), waiting.len())
    }

    fn uncleaned(&self, now: Timestamp) -> Vec<Finding> {
        let late = |id: &&BuildId| match self.standing(id) {
            Some(Standing::Over { since: at }) => since(at, now) > CLEANED_UP,
            _ => false,
        };
        let never = |(id, at): &(&BuildId, &Timestamp)| {
            self.standing(id) == Some(Standing::Unknown) && since(**at, now) > CLEANED_UP
        };
        let late: Vec<&BuildId> = self.to_clean.keys().filter(late).collect();
        let never: Vec<&BuildId> = self.to_clean.iter().filter(never).map(|(id, _)| id).collect();
        let mut findings = Vec::new();
        if let Some(first) = late.first() {
            findings.push(Finding::warning(
                CLEANING,
                format!(
                    "{} builds are over for more than {} and not cleaned up: their secrets are kept, sealed; `{first}` for one",
                    late.len(),
                    spoken(CLEANED_UP)
                ),
                "it happens by itself once a log-relay has completed the build's log and an orchestrator can reach its run: \
                 both must live on the engine's host, and their logs say what keeps them",
            ));
        }
        if let Some(first) = never.first() {
            findings.push(Finding::warning(
                CLEANING,
                format!("{} entries of KILN_SECRETS belong to no build: `{first}` for one", never.len()),
                "a live orchestrator removes them within minutes",
            ));
        }
        if findings.is_empty() {
            findings.push(Finding::ok(CLEANING, "nothing is left of builds that are over for long"));
        }
        findings
    }
}

/// Whether the installation's key opens what the bus holds, if there is anything.
pub async fn seal_key(bus: &Bus, key: &OpenKey) -> Result<Finding, BusError> {
    const PART: &str = "seal key";
    match bus.check_seal_key(&key.seal_key()).await {
        Err(BusError::Refused { detail, .. }) => {
            let remedy = "give every role the same key: `seal.seed` or `seal.seed_file`, of gateways `seal.public_key`";
            return Ok(Finding::problem(PART, detail, remedy));
        }
        checked => checked?,
    }
    let secrets = SecretsBucket::open(bus).await?;
    for id in secrets.builds().await? {
        // One that is gone by now says nothing.
        let Some(sealed) = secrets.get(&id).await? else { continue };
        return Ok(match kiln_bus::secrets::open(key, &sealed) {
            Ok(_) => Finding::ok(PART, "it opens what the bus holds"),
            Err(error) => Finding::problem(
                PART,
                format!("the secrets of build `{id}`: {error}"),
                "give every role the key that this installation began with (`seal.seed` or `seal.seed_file`); without it, \
                 builds that wait fail, and what they brought can't be read again",
            ),
        });
    }
    Ok(Finding::ok(PART, "it is there; the bus holds nothing that it could be tried on"))
}

fn of_active(entry: &Entry, live: &BTreeSet<InstanceId>, now: Timestamp) -> Option<Finding> {
    let record = &entry.record;
    let id = &record.id;
    let quiet = since(entry.stored_at, now);
    if let Some(holder) = record.claimed_by.as_ref().filter(|holder| !live.contains(holder))
        && quiet > TAKE_OVER
    {
        return Some(Finding::problem(
            BUILDS,
            format!("`{id}` is held by {holder}, which does not live, and nobody takes it over"),
            "start an orchestrator; if one runs, its log says why it can't",
        ));
    }
    let deadline = record.deadline().filter(|_| record.state == State::Running);
    if let Some(late) = deadline.map(|at| since(at, now)).filter(|late| *late > PAST_DEADLINE) {
        return Some(Finding::problem(
            BUILDS,
            format!("`{id}` runs {} past its deadline", spoken(late)),
            format!("see the log of the orchestrator for it; `kiln cancel {id}` asks again that it stop"),
        ));
    }
    let limit = record.start_deadline().filter(|_| record.waits_for_start());
    if let Some(late) = limit.map(|at| since(at, now)).filter(|late| *late > PAST_DEADLINE) {
        return Some(Finding::problem(
            BUILDS,
            format!("`{id}` waits {} longer than it may", spoken(late)),
            "start an orchestrator: any ends such builds; if one runs, its log says what keeps it from that",
        ));
    }
    if record.refused_starts > 0 {
        return Some(Finding::warning(
            BUILDS,
            format!("`{id}` could not be started {} times: {}", record.refused_starts, record.message),
            "it is tried again, up to a minute apart, until its time in the queue is up; what the engine says tells what it lacks",
        ));
    }
    None
}

/// None before.
fn since(at: Timestamp, now: Timestamp) -> Duration {
    now.duration_since(at).try_into().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use kiln_domain::finding::Verdict;

    use super::*;

    fn entry(change: impl FnOnce(&mut Entry)) -> Entry {
        let at: Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
        let mut record = kiln_testkit::records::queued("x", *b"0123456789").unwrap();
        record.queued_at = Some(at);
        record.timeout_ms = 60_000;
        record.queue_limit_ms = 600_000;
        let mut entry =
            Entry { record, event: String::new(), sequence: 1, stored_at: at, event_id: String::new() };
        change(&mut entry);
        entry
    }

    fn found(minutes: i64, change: impl FnOnce(&mut Entry)) -> Vec<(Verdict, String)> {
        let entry = entry(change);
        let (id, at) = (entry.record.id.clone(), entry.stored_at);
        let live = BTreeSet::from(["orchestrator-1".parse().unwrap()]);
        let builds = Builds {
            known: BTreeMap::from([(id.clone(), Some(entry))]),
            to_clean: BTreeMap::from([(id.clone(), at)]),
            left_out: 0,
            full: None,
        };
        let findings = builds.findings(&live, at + jiff::SignedDuration::from_mins(minutes));
        findings.into_iter().map(|found| (found.verdict, found.says.replace(id.as_str(), "ID"))).collect()
    }

    #[test]
    fn a_build_is_in_somebodys_hands_within_its_time_and_cleaned_up() {
        let held = |by: &str, running: bool| {
            let by = by.parse().unwrap();
            move |entry: &mut Entry| {
                entry.record.claimed_by = Some(by);
                entry.record.claims = 1;
                if running {
                    entry.record.state = State::Running;
                    entry.record.attempt_started_at = Some(entry.stored_at);
                }
            }
        };
        let refused = |entry: &mut Entry| {
            entry.record.refused_starts = 2;
            entry.record.message = "no room".into();
        };
        let clean = (Verdict::Ok, "nothing is left of builds that are over for long".to_owned());
        for (minutes, findings, says) in [
            (3, found(3, |_| {}), "0 run, 1 wait, the oldest for 3 min"),
            (0, found(0, held("orchestrator-1", true)), "1 run, 0 wait"),
            (0, found(0, held("orchestrator-2", true)), "1 run, 0 wait"),
            (
                2,
                found(2, held("orchestrator-2", false)),
                "`ID` is held by orchestrator-2, which does not live, and nobody takes it over",
            ),
            (5, found(5, held("orchestrator-1", true)), "`ID` runs 4 min past its deadline"),
            (15, found(15, |_| {}), "`ID` waits 5 min longer than it may"),
            (5, found(5, refused), "`ID` could not be started 2 times: no room"),
        ] {
            let verdict = match says {
                _ if says.contains("could not be started") => Verdict::Warning,
                _ if says.starts_with('`') => Verdict::Problem,
                _ => Verdict::Ok,
            };
            assert_eq!(findings, [(verdict, says.to_owned()), clean.clone()], "after {minutes} min");
        }
        let over = |entry: &mut Entry| {
            entry.record.state = State::Failed;
            entry.record.finished_at = Some(entry.stored_at);
        };
        assert_eq!(found(9, over)[1], clean);
        assert!(
            matches!(&found(11, over)[1], (Verdict::Warning, says) if says.starts_with("1 builds are over for more than 10 min"))
        );
    }
}
