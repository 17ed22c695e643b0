//! The journal's mirror, which other subscribers read: what they would notice, mended where it can be.

use std::time::Duration;

use async_nats::jetstream::response::Response;
use async_nats::jetstream::stream::Info;
use kiln_contract::subject;
use tokio::time::Instant;

use super::KEEP;
use crate::connection::Bus;
use crate::error::BusError;

/// A mirror that is behind its journal takes something within this long, or it stands still. After a change of leader
/// nats-server may wait for minutes before it asks the journal again.
const STANDS: Duration = Duration::from_secs(10);
/// The mirror's leader gives up its place when it is asked here; the next one asks the journal at once.
const STEP_DOWN: &str = "STREAM.LEADER.STEPDOWN";

/// What is known of the mirror from one look to the next.
#[derive(Default)]
pub(super) struct Mirror {
    behind: Option<Behind>,
}

/// How far it was, under which leader, and since when.
struct Behind {
    last_sequence: u64,
    leader: Option<String>,
    since: Instant,
    stands: bool,
}

impl Mirror {
    /// What is wrong with it: a word and a sentence.
    pub(super) async fn look(
        &mut self,
        bus: &Bus,
        journal: &Info,
        mirror: &Info,
    ) -> Option<(&'static str, String)> {
        // It goes on from where it is: it would leave out what a younger journal has up to there. It is missing then, and is
        // made as everything else that is.
        if mirror.created < journal.created {
            let became = match bus.call(KEEP, bus.js.delete_stream(subject::EVENTS_STREAM)).await {
                Ok(_) => "it is deleted, and made anew in some seconds".to_owned(),
                Err(error) => format!("it can't be deleted now: {error}"),
            };
            return Some(("outlived_journal", format!("it mirrors a journal that is gone: {became}")));
        }
        let last_sequence = mirror.state.last_sequence;
        let lag = lag(journal, mirror);
        if lag == 0 {
            self.behind = None;
            return None;
        }
        let leader = mirror.cluster.as_ref().and_then(|cluster| cluster.leader.clone());
        let now = Instant::now();
        let behind =
            self.behind.get_or_insert(Behind { last_sequence, leader: None, since: now, stands: false });
        if behind.last_sequence != last_sequence {
            *behind = Behind { last_sequence, leader: leader.clone(), since: now, stands: false };
        }
        // Another process may have changed the leader; the next one has as long again.
        if behind.leader != leader {
            (behind.leader, behind.since) = (leader.clone(), now);
        }
        let too_long = behind.since.elapsed() >= STANDS;
        behind.stands |= too_long;
        let mut why = format!("it is {lag} events behind {} and takes none", subject::JOURNAL_STREAM);
        if too_long && leader.is_some() {
            behind.since = now;
            why += &match step_down(bus, subject::EVENTS_STREAM).await {
                Ok(()) => ": another of its servers goes on with it".to_owned(),
                Err(error) => format!(": its leader can't be changed now: {error}"),
            };
        }
        behind.stands.then_some(("stands_still", why))
    }
}

/// How many events of the journal the mirror does not have yet.
pub(super) fn lag(journal: &Info, mirror: &Info) -> u64 {
    journal.state.last_sequence.saturating_sub(mirror.state.last_sequence)
}

async fn step_down(bus: &Bus, stream: &str) -> Result<(), BusError> {
    let asked: Response<serde_json::Value> =
        bus.call(KEEP, bus.js.request(format!("{STEP_DOWN}.{stream}"), &())).await?;
    match asked {
        Response::Ok(_) => Ok(()),
        Response::Err { error } => Err(BusError::unavailable(KEEP, error.to_string())),
    }
}
