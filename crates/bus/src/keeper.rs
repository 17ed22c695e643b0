//! Looks after the streams and buckets while a process runs: what was deleted by hand is made again, and what is wrong is
//! said once, counted, shown as a metric while it lasts, and said again when it is over.

mod metrics;
mod mirror;

use std::collections::BTreeMap;
use std::time::Duration;

use async_nats::jetstream::stream::{DiscardPolicy, Info, StorageType};
use async_nats::jetstream::{kv, stream};
use futures::StreamExt as _;
use kiln_contract::subject;
use prometheus_client::registry::Registry;
use tokio::sync::watch;
use tokio::time::Instant;

use self::metrics::Metrics;
use self::mirror::Mirror;
use crate::connection::{Bus, DISK};
use crate::error::BusError;
use crate::inspect::{differences, is_missing, of_bucket, share};
use crate::journal::jittered;
use crate::layout::{Layout, buckets, streams};
use crate::trouble::Trouble;

/// How often it looks. A deletion is heard of at once, where the server lets us.
const LOOK: Duration = Duration::from_secs(5);
/// How soon it looks again at what was missing.
const LOOK_AT_MISSING: Duration = Duration::from_secs(1);
const MISSING: &str = "missing";
const NO_LEADER: &str = "no_leader";
const IN_MEMORY: &str = "it is kept in memory, and nats-server was started anew or somebody deleted it";
/// How long a stream must have been missing before it is made again. nats-server 2.15 tells of a deletion before it has removed
/// the stream's folder: one that is made at that moment loses its own, and takes nothing until the server is restarted.
const MADE_AGAIN_AFTER: Duration = Duration::from_secs(3);
/// The server answers within this long, or it counts as unreachable.
const ANSWER: Duration = Duration::from_secs(2);
/// What the server tells everybody when a stream, or a bucket's, is deleted.
const DELETED: &str = "$JS.EVENT.ADVISORY.STREAM.DELETED.*";
const KEEP: &str = "look after the streams";
/// A stream that refuses when it is full is called full from here on. (Of the journal an orchestrator says it earlier, when what
/// is left is needed for the ends of the builds that it holds.)
const FULL_PERCENT: u64 = 95;

/// One process's look after the bus. It does the same as that of any other process, at any time, without harm.
pub struct Keeper {
    bus: Bus,
    layout: Layout,
    metrics: Metrics,
    missing_since: BTreeMap<String, Instant>,
    mirror: Mirror,
    /// What was wrong when it looked last.
    troubles: BTreeMap<Trouble, String>,
    /// Why nothing is taken.
    takes: watch::Sender<Option<String>>,
}

/// Whether the bus takes what is written, as a keeper saw it last; clones share it.
#[derive(Clone, Debug)]
pub struct Takes(watch::Receiver<Option<String>>);

impl Takes {
    /// For who is about to have something written: an error, at once, while nothing is taken.
    pub fn check(&self, operation: &'static str) -> Result<(), BusError> {
        match &*self.0.borrow() {
            Some(why) => Err(BusError::Full { operation, detail: why.clone() }),
            None => Ok(()),
        }
    }
}

/// How what is missing is made.
enum Made {
    Stream(Box<stream::Config>),
    Bucket(Box<kv::Config>),
}

impl Keeper {
    /// Of the installation's layout, with what it counts in `registry`.
    pub fn new(bus: &Bus, layout: &Layout, registry: &mut Registry) -> Self {
        Self {
            bus: bus.clone(),
            layout: layout.clone(),
            metrics: Metrics::register(registry),
            missing_since: BTreeMap::new(),
            mirror: Mirror::default(),
            troubles: BTreeMap::new(),
            takes: watch::Sender::new(None),
        }
    }

    /// What it finds of writes.
    pub fn takes(&self) -> Takes {
        Takes(self.takes.subscribe())
    }

    /// Looks again and again; ends when it is dropped.
    pub async fn keep(mut self) {
        // Without it a deletion is seen at the next look.
        let mut deleted = self.bus.client.subscribe(DELETED).await.ok();
        loop {
            self.look().await;
            let told = async {
                match &mut deleted {
                    // Its end, as with the connection's, is no news.
                    Some(deleted) => match deleted.next().await {
                        Some(told) => Some(told),
                        None => std::future::pending().await,
                    },
                    None => std::future::pending().await,
                }
            };
            // What is missing may have refused to be made, as while the server still deletes it.
            let missing = self.troubles.keys().any(|trouble| trouble.what == MISSING);
            let pause = if missing { LOOK_AT_MISSING } else { LOOK };
            let _ = tokio::time::timeout(jittered(pause), told).await;
        }
    }

    async fn look(&mut self) {
        let mut found = BTreeMap::new();
        let mut note = |part: &str, what: &'static str, why: String| {
            found.insert(Trouble { part: part.to_owned(), what }, why);
        };
        if !self.bus.answers(ANSWER).await {
            note("bus", "unreachable", "nats-server can't be reached, or does not answer".into());
            // How the streams stand can't be known: as before.
            found.extend(self.troubles.clone());
            found.extend(self.bus.troubles.take());
            return self.tell(found);
        }
        let mut journal = None;
        let mut mirror = None;
        for (wanted, made) in self.wanted() {
            let name = wanted.name.clone();
            let looked = self.bus.attend(KEEP, self.bus.js.get_stream(&name)).await;
            let info = match looked {
                Ok(Ok(stream)) => {
                    self.missing_since.remove(&name);
                    stream.cached_info().clone()
                }
                Ok(Err(error)) if is_missing(&error.kind()) && wanted.storage == StorageType::Memory => {
                    // Nothing is wrong: nobody needs what is kept so.
                    match self.make(made).await {
                        Ok(()) => tracing::info!(bus.part = name, "{name}: {IN_MEMORY}: it is made again"),
                        Err(error) => {
                            note(
                                &name,
                                MISSING,
                                format!("{IN_MEMORY}, and can't be made again now: {error}"),
                            );
                        }
                    }
                    continue;
                }
                Ok(Err(error)) if is_missing(&error.kind()) => {
                    let since = *self.missing_since.entry(name.clone()).or_insert_with(Instant::now);
                    let became = if since.elapsed() < MADE_AGAIN_AFTER {
                        "it is made again, empty, in some seconds".to_owned()
                    } else {
                        match self.make(made).await {
                            Ok(()) => "it is made again, empty".to_owned(),
                            Err(error) => format!("it can't be made again now: {error}"),
                        }
                    };
                    let why = if name == subject::EVENTS_STREAM {
                        "it is deleted, by hand or as it mirrored a journal that is gone"
                    } else {
                        "somebody deleted it, and what it held is lost"
                    };
                    note(&name, MISSING, format!("{why}: {became}"));
                    continue;
                }
                Ok(Err(error)) => {
                    note(&name, NO_LEADER, format!("the server says nothing of it: {error}"));
                    continue;
                }
                Err(error) => {
                    note(&name, NO_LEADER, error.to_string());
                    continue;
                }
            };
            self.metrics.size(&info);
            for (what, why) in wrong_with(&wanted, &info) {
                note(&name, what, why);
            }
            match name.as_str() {
                subject::JOURNAL_STREAM => journal = Some(info),
                subject::EVENTS_STREAM => mirror = Some(info),
                _ => {}
            }
        }
        // Written to is a bucket, which must be there for that.
        let mut takes_nothing = None;
        if found.keys().all(|trouble| ![MISSING, NO_LEADER].contains(&trouble.what))
            && let Err(error) = self.bus.probe().await
        {
            let trouble = Trouble { part: "bus".to_owned(), what: "takes_nothing" };
            let why = format!("nats-server answers, and takes no write: {error}; {DISK}");
            takes_nothing = Some(why.clone());
            found.insert(trouble, why);
        }
        self.takes.send_replace(takes_nothing);
        if let (Some(journal), Some(mirror)) = (journal, mirror) {
            let lag = mirror::lag(&journal, &mirror);
            self.metrics.mirror_lag.set(i64::try_from(lag).unwrap_or(i64::MAX));
            if let Some((what, why)) = self.mirror.look(&self.bus, &journal, &mirror).await {
                found.insert(Trouble { part: subject::EVENTS_STREAM.to_owned(), what }, why);
            }
        }
        found.extend(self.bus.troubles.take());
        self.tell(found);
    }

    /// Every stream as it should be, a bucket's too, and how it is made.
    fn wanted(&self) -> Vec<(stream::Config, Made)> {
        let of_streams =
            streams(&self.layout).into_iter().map(|config| (config.clone(), Made::Stream(Box::new(config))));
        let of_buckets = buckets(&self.layout)
            .into_iter()
            .map(|config| (of_bucket(config.clone()).1, Made::Bucket(Box::new(config))));
        of_streams.chain(of_buckets).collect()
    }

    async fn make(&self, made: Made) -> Result<(), BusError> {
        // Another process may be quicker: then it is there, which is all that is wanted.
        match made {
            Made::Stream(config) => {
                self.bus.call(KEEP, self.bus.js.get_or_create_stream(*config)).await.map(|_| ())
            }
            Made::Bucket(config) => {
                self.bus.call(KEEP, self.bus.js.create_or_update_key_value(*config)).await.map(|_| ())
            }
        }
    }

    /// Says what is new and what is over.
    fn tell(&mut self, found: BTreeMap<Trouble, String>) {
        for (trouble, why) in &found {
            if !self.troubles.contains_key(trouble) {
                let Trouble { part, what } = trouble;
                tracing::error!(bus.part = part, bus.trouble = what, "{part} ({what}): {why}");
                self.metrics.troubles.get_or_create(trouble).inc();
                self.metrics.trouble.get_or_create(trouble).set(1);
            }
        }
        for trouble in self.troubles.keys().filter(|trouble| !found.contains_key(*trouble)) {
            let Trouble { part, what } = trouble;
            tracing::info!(bus.part = part, bus.trouble = what, "{part} ({what}): that is over");
            self.metrics.trouble.get_or_create(trouble).set(0);
        }
        self.troubles = found;
    }
}

/// What is wrong with a stream that is there: a word and a sentence for each.
fn wrong_with(wanted: &stream::Config, info: &Info) -> Vec<(&'static str, String)> {
    let mut wrong = Vec::new();
    let differences = differences(wanted, &info.config);
    if !differences.is_empty() {
        // Not put right: two processes with different settings would do so in turns for ever.
        let which = differences.join("; ");
        wrong.push(("different", format!("it is not as this process's settings say: {which}")));
    }
    let full = share(info.state.bytes, info.config.max_bytes).filter(|share| *share >= FULL_PERCENT);
    if let Some(share) = full.filter(|_| info.config.discard == DiscardPolicy::New) {
        let limit = info.config.max_bytes;
        wrong.push((
            "full",
            format!("{share} % of its {limit} bytes are used: what is left is kept for what has begun"),
        ));
    }
    if info.cluster.as_ref().is_some_and(|cluster| cluster.leader.is_none()) {
        wrong.push((NO_LEADER, "nothing can be written: most of its servers must run".into()));
    }
    wrong
}
