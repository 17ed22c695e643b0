//! What is asked of the bus: itself, who lives, and how builds stand.

use std::time::Duration;

use jiff::Timestamp;
use kiln_bus::inspect::Instances;
use kiln_bus::{Bus, BusError};
use kiln_domain::finding::Finding;
use kiln_domain::id::BuildId;
use kiln_engine_local::inspect::{Found, Stands};
use kiln_orchestrator::inspect::{Builds, Standing, seal_key};

use super::{PATIENCE, engine, within};
use crate::config::Config;

/// What is over, or unknown, for less may still be in somebody's hands.
const SETTLED: Duration = Duration::from_secs(5 * 60);

/// What the bus said.
#[derive(Default)]
pub(super) struct Answer {
    pub(super) findings: Vec<Finding>,
    /// How builds stand; none where it could not be asked.
    builds: Option<Builds>,
    /// The engine's builders are on another host.
    pub(super) elsewhere: bool,
}

impl Answer {
    /// Of a bus that was not asked.
    pub(super) fn none(why: Finding) -> Self {
        Self { findings: vec![why], ..Self::default() }
    }

    /// How the build of a run stands.
    pub(super) fn stands(&self, found: &Found) -> Stands {
        let Some(builds) = &self.builds else { return Stands::NotAsked };
        let settled =
            |since: Timestamp| Duration::try_from(now().duration_since(since)).is_ok_and(|age| age > SETTLED);
        match builds.standing(&found.run.build()) {
            Some(Standing::Over { since }) if settled(since) => {
                match builds.is_to_clean(&found.run.build()) {
                    true => Stands::Over,
                    false => Stands::Cleaned,
                }
            }
            Some(Standing::Unknown) if found.age > SETTLED => Stands::Unknown,
            Some(_) => Stands::InHand,
            None => Stands::NotAsked,
        }
    }
}

/// Asks the bus all that is to be known, `builds` (of the runs that were found) included.
pub(super) async fn ask(config: &Config, builds: Vec<BuildId>) -> Answer {
    let bus = match connect(config).await {
        Ok(bus) => bus,
        Err(finding) => return Answer::none(finding),
    };
    let layout = config.layout();
    let (parts, instances, builds, key) = tokio::join!(
        within("nats", async { Ok(bus.inspect(&layout).await) }),
        within("roles", bus.instances()),
        within("builds", Builds::read(&bus, builds)),
        key(config, &bus),
    );
    let mut findings = parts.unwrap_or_else(|late| vec![late]);
    findings.push(key);
    let mut elsewhere = false;
    let live = match instances {
        Ok(instances) => {
            findings.extend(roles(&instances));
            elsewhere = instances.hosts.iter().next().is_some_and(|host| !engine::is_on(config, host));
            Some(instances.leases)
        }
        Err(finding) => {
            findings.push(finding);
            None
        }
    };
    let builds = match (builds, live) {
        (Ok(builds), Some(live)) => {
            findings.extend(builds.findings(&live, now()));
            Some(builds)
        }
        (Ok(builds), None) => Some(builds),
        (Err(finding), _) => {
            findings.push(finding);
            None
        }
    };
    bus.close().await;
    Answer { findings, builds, elsewhere }
}

async fn connect(config: &Config) -> Result<Bus, Finding> {
    const PART: &str = "nats";
    let connect = config.connect("doctor").map_err(|error| {
        Finding::problem(
            PART,
            format!("{error:#}"),
            "run this as the user of the roles, or mend the configuration",
        )
    })?;
    let refused = |error: &BusError| {
        let text = error.to_string();
        let remedy = if text.to_ascii_lowercase().contains("authorization") {
            "give the services' user: `nats.user` and `nats.password` or `nats.password_file` (KILN_NATS__USER, …)"
        } else if matches!(error, BusError::Refused { .. }) {
            "run nats-server 2.11 or newer with `jetstream` in its configuration (`scripts/bootstrap` gets one)"
        } else {
            "start nats-server, or say where it is: `nats.url` (KILN_NATS__URL)"
        };
        Finding::problem(PART, text, remedy)
    };
    match tokio::time::timeout(PATIENCE, connect.connect()).await {
        Ok(connected) => connected.map_err(|error| refused(&error)),
        Err(_) => Err(Finding::problem(
            PART,
            format!("{} takes the connection and says nothing", connect.url),
            "see whether that is NATS, and whether it hangs",
        )),
    }
}

async fn key(config: &Config, bus: &Bus) -> Finding {
    const PART: &str = "seal key";
    if config.seal.seed.is_none() && config.seal.seed_file.is_none() {
        return Finding::unchecked(
            PART,
            "this configuration has none",
            "give the one of resolver, orchestrator and log-relay: `seal.seed_file` (KILN_SEAL__SEED_FILE)",
        );
    }
    match config.open_key() {
        Ok(key) => within(PART, seal_key(bus, &key)).await.unwrap_or_else(|trouble| trouble),
        Err(error) => Finding::problem(PART, format!("{error:#}"), "see `seal` in the configuration"),
    }
}

/// Who is there of the roles that can be seen on the bus.
fn roles(instances: &Instances) -> Vec<Finding> {
    let leases = |role: &str| instances.leases.iter().filter(|instance| instance.role() == role).count();
    let asked = |role: &str| instances.services.iter().filter(|name| name.as_str() == role).count();
    let live = |part, live, without, role| match live {
        0 => Finding::problem(
            part,
            format!("none is there: {without}"),
            format!("start `kiln {role}`, or `kiln up`"),
        ),
        live => Finding::ok(part, format!("{live} there")),
    };
    let orchestrator = kiln_orchestrator::ROLE;
    const NO_BUILD: &str = "no build is accepted, started or ended";
    let orchestrators = match (leases(orchestrator), asked(orchestrator)) {
        (leases, 0) if leases > 0 => Finding::problem(
            "orchestrators",
            format!("{leases} hold leases, and none of them answers: they were killed, or hang; {NO_BUILD}"),
            "start `kiln orchestrator`, or `kiln up`; what they held goes on when their leases have lapsed (`holders.lease_seconds`)",
        ),
        (leases, answer) if leases > answer => Finding::warning(
            "orchestrators",
            format!("{leases} hold leases, and {answer} answer: others were killed, or hang"),
            "what those held goes on by itself when their leases have lapsed (`holders.lease_seconds`); end one that hangs",
        ),
        (leases, _) => live("orchestrators", leases, NO_BUILD, "orchestrator"),
    };
    vec![
        orchestrators,
        live(
            "log-relays",
            leases(kiln_log_relay::ROLE),
            "no log is written, and no build cleaned up",
            "log-relay",
        ),
        live("resolvers", asked(kiln_resolver::ROLE), "no build is accepted", "resolver"),
    ]
}

#[expect(clippy::disallowed_methods, reason = "ages are compared with the stream's wall-clock time")]
fn now() -> Timestamp {
    Timestamp::now()
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_domain::finding::Verdict;
    use kiln_domain::id::InstanceId;

    #[test]
    fn who_holds_a_lease_and_does_not_answer_is_told() {
        for (leases, answers, verdict, says) in [
            (0, 0, Verdict::Problem, "none is there"),
            (2, 0, Verdict::Problem, "2 hold leases, and none of them answers"),
            (2, 1, Verdict::Warning, "2 hold leases, and 1 answer"),
            (2, 2, Verdict::Ok, "2 there"),
        ] {
            let instances = Instances {
                leases: (0..leases).map(|n| InstanceId::new("orchestrator", n).unwrap()).collect(),
                services: vec!["orchestrator".to_owned(); answers],
                ..Instances::default()
            };
            let found = roles(&instances).swap_remove(0);
            assert_eq!((found.part.as_str(), found.verdict), ("orchestrators", verdict), "{found:?}");
            assert!(found.says.contains(says), "{found:?}");
        }
    }
}
