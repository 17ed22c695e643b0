//! An examination of the bus: is it what Kiln needs, and does it hold what [`crate::layout`] makes.

use std::collections::BTreeSet;
use std::time::Duration;

use async_nats::jetstream::context::{GetStreamError, GetStreamErrorKind};
use async_nats::jetstream::stream::{Config, DiscardPolicy, Info, Stream};
use async_nats::jetstream::{self, kv};
use futures::StreamExt as _;
use kiln_contract::bucket;
use kiln_contract::orchestrator::Cancel;
use kiln_contract::question::Question;
use kiln_domain::finding::Finding;
use kiln_domain::id::InstanceId;

use crate::connection::{Bus, DISK};
use crate::error::BusError;
use crate::holders::leases;
use crate::layout::{Layout, buckets, streams};
use crate::room::size;

/// What Kiln's own configurations set. With less, larger requests are refused.
const MAX_PAYLOAD: usize = 8 << 20;
/// The newest server that Kiln is tested with.
const TESTED: (u64, u64) = (2, 15);
/// What the server allows a stream unless it is told otherwise.
const MAX_CONSUMERS: usize = 1_000;
/// A mirror that is behind by so many messages stands still rather than lags.
const MIRROR_LAG: u64 = 10_000;
/// How long services may take to say that they are there; longer, while fewer do than hold leases.
const ANSWERS: Duration = Duration::from_millis(700);
const LATE_ANSWERS: Duration = Duration::from_secs(3);
/// Of the roles that hold leases, the one that is asked.
const ORCHESTRATOR: &str = <Cancel as Question>::SERVICE;

const RESTART: &str = "restart a role, or `kiln up`: at its start it brings streams and buckets up to date; if it differs again, \
     processes have different `streams.*` in their configurations";

/// Who answers or holds a lease.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Instances {
    /// Of the roles that take leases, by instance: orchestrators and log-relays.
    pub leases: BTreeSet<InstanceId>,
    /// The hosts that their engines' builders are bound to.
    pub hosts: BTreeSet<String>,
    /// Of those that are asked, the name of each that answered: orchestrators and resolvers.
    pub services: Vec<String>,
}

impl Bus {
    /// Examines the server, its JetStream, and every stream and bucket.
    pub async fn inspect(&self, layout: &Layout) -> Vec<Finding> {
        let mut findings = self.inspect_server(layout);
        let (mut of_streams, mut missing) = (Vec::new(), Vec::new());
        let buckets = buckets(layout).map(of_bucket);
        for (what, wanted) in streams(layout)
            .into_iter()
            .map(|wanted| (format!("stream {}", wanted.name), wanted))
            .chain(buckets.into_iter().map(|(name, wanted)| (format!("bucket {name}"), wanted)))
        {
            let found = self.js.get_stream(&wanted.name).await;
            of_streams.extend(of_answer(&what, &wanted, &found));
            if found.is_err_and(|error| is_missing(&error.kind())) {
                missing.push(wanted);
            }
        }
        findings.push(match self.js.query_account().await {
            Ok(account) => self.inspect_room(&account, layout, &missing).await,
            Err(error) => Finding::problem(
                "nats jetstream",
                format!("it does not answer: {error}"),
                "see the log of nats-server: JetStream ends when its disk is full or broken (make room, then restart nats-server), and in a cluster it needs most servers",
            ),
        });
        findings.append(&mut of_streams);
        findings.push(match self.probe().await {
            Ok(()) => Finding::ok("nats writes", "what is written is taken"),
            Err(error) => Finding::problem("nats writes", format!("nothing is taken: {error}"), DISK),
        });
        findings
    }

    /// Which instances live.
    pub async fn instances(&self) -> Result<Instances, BusError> {
        const ASK: &str = "ask who is there";
        let store = self.js.get_key_value(bucket::HOLDERS).await;
        let store = store.map_err(|error| BusError::unavailable(ASK, error))?;
        let (mut live, mut hosts) = (BTreeSet::new(), BTreeSet::new());
        for lease in leases(&store).await? {
            live.insert(lease.instance);
            hosts.extend(Some(lease.host).filter(|host| !host.is_empty()));
        }
        let inbox = self.client.new_inbox();
        let mut answers =
            self.client.subscribe(inbox.clone()).await.map_err(|error| BusError::unavailable(ASK, error))?;
        let asked = self.client.publish_with_reply("$SRV.PING", inbox, "".into()).await;
        asked.map_err(|error| BusError::unavailable(ASK, error))?;
        let mut services: Vec<String> = Vec::new();
        let held = live.iter().filter(|instance| instance.role() == ORCHESTRATOR).count();
        let asked = tokio::time::Instant::now();
        loop {
            let answer = services.iter().filter(|name| name.as_str() == ORCHESTRATOR).count();
            let until = asked + if answer < held { LATE_ANSWERS } else { ANSWERS };
            let Ok(Some(answer)) = tokio::time::timeout_at(until, answers.next()).await else { break };
            let answer: serde_json::Value = serde_json::from_slice(&answer.payload).unwrap_or_default();
            let name = answer.get("name").and_then(|name| name.as_str());
            services.extend(name.and_then(|name| name.strip_prefix("kiln-")).map(str::to_owned));
        }
        Ok(Instances { leases: live, hosts, services })
    }

    fn inspect_server(&self, layout: &Layout) -> Vec<Finding> {
        let info = self.client.server_info();
        let mut findings = vec![version(&info.version)];
        let payload = self.client.max_payload();
        findings.push(if payload >= MAX_PAYLOAD {
            Finding::ok("nats max_payload", format!("{} MiB", payload >> 20))
        } else {
            Finding::warning(
                "nats max_payload",
                format!("{} KiB: requests with larger contexts or secrets are refused", payload >> 10),
                "set `max_payload: 8MB` in the configuration of nats-server",
            )
        });
        findings.push(match (info.cluster.is_some(), layout.replicas) {
            (false, 1) => Finding::ok("nats replicas", "one server, one copy of each stream"),
            (true, 1) => Finding::warning(
                "nats replicas",
                "the server belongs to a cluster, but each stream lies on one server of it: with that one builds are lost",
                "set `streams.replicas` (KILN_STREAMS__REPLICAS) to 3 for every role",
            ),
            (true, replicas) => Finding::ok("nats replicas", format!("a cluster, {replicas} copies of each stream")),
            (false, replicas) => Finding::problem(
                "nats replicas",
                format!("{replicas} copies of each stream are asked for, of a server that is no cluster"),
                "connect to a cluster of as many servers, or set `streams.replicas` to 1",
            ),
        });
        findings
    }
}

fn of_answer(what: &str, wanted: &Config, answer: &Result<Stream, GetStreamError>) -> Vec<Finding> {
    match answer {
        Ok(stream) => of_stream(what, wanted, stream.cached_info()),
        Err(error) if is_missing(&error.kind()) => vec![Finding::problem(
            what,
            "it is not there",
            "start a role, or `kiln up`: while one runs it makes what is missing; what the stream held is lost",
        )],
        Err(error) => vec![Finding::problem(
            what,
            format!("the server says nothing of it: {error}"),
            "see the log of nats-server: a stream without a leader needs most of its servers, and one that met a full disk a restart of nats-server",
        )],
    }
}

/// Whether the answer to a question about a stream is that there is none.
pub(crate) fn is_missing(kind: &GetStreamErrorKind) -> bool {
    matches!(kind, GetStreamErrorKind::JetStream(error) if error.error_code() == jetstream::ErrorCode::STREAM_NOT_FOUND)
}

fn version(version: &str) -> Finding {
    let mut numbers = version.split('.').map_while(|number| number.parse::<u64>().ok());
    match (numbers.next(), numbers.next()) {
        (Some(major), Some(minor)) if (major, minor) > TESTED => Finding::warning(
            "nats",
            format!(
                "reached; nats-server {version} is newer than {}.{}, which Kiln is tested with",
                TESTED.0, TESTED.1
            ),
            "nothing, as long as all else is well",
        ),
        // An older one than Kiln can use was refused when it was connected to.
        _ => Finding::ok("nats", format!("reached; nats-server {version}")),
    }
}

fn of_stream(what: &str, wanted: &Config, info: &Info) -> Vec<Finding> {
    let mut findings = Vec::new();
    let differences = differences(wanted, &info.config);
    if !differences.is_empty() {
        findings.push(Finding::problem(
            what,
            format!("it is not as it should be: {}", differences.join("; ")),
            RESTART,
        ));
    }
    findings.extend(fullness(what, info));
    let consumers = info.state.consumer_count;
    let allowed =
        usize::try_from(info.config.max_consumers).ok().filter(|max| *max > 0).unwrap_or(MAX_CONSUMERS);
    if consumers * 5 >= allowed * 4 {
        findings.push(Finding::warning(
            what,
            format!("{consumers} of {allowed} consumers are in use: beyond, no further process can read it"),
            "look for subscribers that make a consumer for each reader (`nats consumer ls`); others than Kiln's own belong on KILN_EVENTS",
        ));
    }
    if let Some(cluster) = &info.cluster {
        if cluster.leader.is_none() {
            findings.push(Finding::problem(
                what,
                "it has no leader: nothing can be written",
                "most of the NATS servers must run and reach each other",
            ));
        }
        for replica in cluster.replicas.iter().filter(|replica| !replica.current || replica.offline) {
            findings.push(Finding::warning(
                what,
                format!(
                    "its copy on {} is {}",
                    replica.name,
                    if replica.offline { "offline" } else { "behind" }
                ),
                "it catches up by itself once that server runs and reaches the others",
            ));
        }
    }
    if let Some(mirror) = info.mirror.as_ref().filter(|mirror| mirror.lag > MIRROR_LAG) {
        findings.push(Finding::warning(
            what,
            format!("it is {} events behind {}", mirror.lag, mirror.name),
            "see the log of nats-server; it catches up by itself",
        ));
    }
    if findings.is_empty() {
        let state = &info.state;
        let full = share(state.bytes, info.config.max_bytes)
            .map_or_else(String::new, |share| format!(", {share} % full"));
        let leader = info.cluster.as_ref().and_then(|cluster| cluster.leader.as_ref());
        let leader = leader.map_or_else(String::new, |leader| format!(", led by {leader}"));
        findings.push(Finding::ok(
            what,
            format!("{} messages, {}{full}{leader}", state.messages, size(state.bytes)),
        ));
    }
    findings
}

/// Only where what is full refuses: others forget their oldest.
fn fullness(what: &str, info: &Info) -> Option<Finding> {
    let share = share(info.state.bytes, info.config.max_bytes).filter(|share| *share >= 80)?;
    if info.config.discard != DiscardPolicy::New {
        return None;
    }
    let says = format!(
        "{share} % of {} are used; full, it refuses new builds",
        size(info.config.max_bytes.unsigned_abs())
    );
    let remedy =
        "raise `streams.journal_max_bytes` for every role and restart one; old events go after 30 days";
    Some(if share >= 95 {
        Finding::problem(what, says, remedy)
    } else {
        Finding::warning(what, says, remedy)
    })
}

pub(crate) fn share(bytes: u64, max_bytes: i64) -> Option<u64> {
    let max = u64::try_from(max_bytes).ok().filter(|max| *max > 0)?;
    Some(bytes.saturating_mul(100) / max)
}

/// What a bucket's stream is to be: its own name, and its configuration as async-nats makes it.
pub(crate) fn of_bucket(config: kv::Config) -> (String, Config) {
    let stream = Config {
        name: bucket::stream(&config.bucket),
        subjects: vec![bucket::subject(&config.bucket, ">")],
        discard: DiscardPolicy::New,
        max_messages_per_subject: config.history,
        max_age: config.max_age,
        max_bytes: config.max_bytes,
        storage: config.storage,
        num_replicas: config.num_replicas,
        allow_direct: true,
        allow_message_ttl: config.limit_markers.is_some(),
        subject_delete_marker_ttl: config.limit_markers,
        ..Config::default()
    };
    (config.bucket, stream)
}

/// A field's name and its value in words.
type Field<'a> = (&'static str, &'a dyn Fn(&Config) -> String);

/// `field is X, not Y` for each that differs.
pub(crate) fn differences(wanted: &Config, found: &Config) -> Vec<String> {
    let unbounded = |limit: i64| if limit > 0 { limit.to_string() } else { "unlimited".to_owned() };
    let age = |age: Duration| format!("{} s", age.as_secs());
    let sorted = |subjects: &[String]| {
        subjects.iter().cloned().collect::<BTreeSet<_>>().into_iter().collect::<Vec<_>>().join(" ")
    };
    let mirror =
        |config: &Config| config.mirror.as_ref().map_or("none", |mirror| mirror.name.as_str()).to_owned();
    let fields: [Field<'_>; 14] = [
        ("subjects", &|config| sorted(&config.subjects)),
        ("mirror", &mirror),
        ("storage", &|config| format!("{:?}", config.storage)),
        ("retention", &|config| format!("{:?}", config.retention)),
        ("discard", &|config| format!("{:?}", config.discard)),
        ("num_replicas", &|config| config.num_replicas.max(1).to_string()),
        ("max_age", &|config| age(config.max_age)),
        ("max_bytes", &|config| unbounded(config.max_bytes)),
        ("max_msgs", &|config| unbounded(config.max_messages)),
        ("max_msgs_per_subject", &|config| unbounded(config.max_messages_per_subject)),
        ("allow_direct", &|config| config.allow_direct.to_string()),
        ("allow_msg_ttl", &|config| config.allow_message_ttl.to_string()),
        ("compression", &|config| {
            format!("{:?}", config.compression.as_ref().unwrap_or(&jetstream::stream::Compression::None))
        }),
        ("republish", &|config| {
            config.republish.as_ref().map_or_else(String::new, |republish| republish.destination.clone())
        }),
    ];
    let mut differences: Vec<String> = fields
        .iter()
        .map(|(field, value)| (field, value(wanted), value(found)))
        .filter(|(_, wanted, found)| wanted != found)
        .map(|(field, wanted, found)| format!("{field} is {found}, not {wanted}"))
        .collect();
    // What isn't set is the server's to choose.
    if wanted.max_consumers > 0 && wanted.max_consumers != found.max_consumers {
        differences.push(format!("max_consumers is {}, not {}", found.max_consumers, wanted.max_consumers));
    }
    if !wanted.duplicate_window.is_zero() && wanted.duplicate_window != found.duplicate_window {
        differences.push(format!(
            "duplicate_window is {}, not {}",
            age(found.duplicate_window),
            age(wanted.duplicate_window)
        ));
    }
    differences
}
