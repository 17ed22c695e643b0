//! Leases: which instances live. A lease only says *when* another may take over; what keeps two from acting is the
//! append.
//!
//! A lease is written by a plain publish with an expected sequence and a time to live, for async-nats's own
//! `create_with_ttl` loses the time to live on a key that has a delete marker.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_nats::jetstream::context::PublishErrorKind;
use async_nats::jetstream::kv::{Operation, Store};
use async_nats::jetstream::message::PublishMessage;
use async_nats::jetstream::stream::LastRawMessageErrorKind;
use futures::StreamExt as _;
use kiln_contract::bucket;
use kiln_domain::id::InstanceId;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::connection::{Bus, PATIENCE};
use crate::error::BusError;
use crate::lease::Lease;

/// Before a renewal that failed is tried again.
const RENEW_AGAIN: Duration = Duration::from_secs(1);

/// This process's lease, and everybody else's.
#[derive(Clone)]
pub struct Holders {
    shared: Arc<Shared>,
}

struct Shared {
    bus: Bus,
    store: Store,
    role: String,
    /// What the lease says: role, life and host.
    says: String,
    lease: Lease,
    mine: Mutex<Mine>,
    live: watch::Sender<BTreeSet<InstanceId>>,
    released: CancellationToken,
}

#[derive(Clone)]
struct Mine {
    instance: InstanceId,
    revision: u64,
    /// When the renewal that succeeded last was *sent*: the lease lasts at least from there.
    renewed: Instant,
    settled: Instant,
}

impl Holders {
    /// Takes a lease for a new instance of `role`, and renews it until it is released. `life` names the process that
    /// it lives and dies with, for [`Bus::end_leases`]; empty where nobody will know. `host` is where its
    /// engine's builders are, if they are bound to one: then it is refused while an instance bound to another one lives.
    pub async fn start(
        bus: &Bus,
        role: &str,
        life: &str,
        host: Option<&str>,
        lease: Lease,
        tasks: &TaskTracker,
    ) -> Result<Self, BusError> {
        let store = bus
            .js
            .get_key_value(bucket::HOLDERS)
            .await
            .map_err(|error| BusError::unavailable("open the holders bucket", error))?;
        let now = Instant::now();
        let mine = Mine { instance: new_instance(role)?, revision: 0, renewed: now, settled: now };
        let holders = Self {
            shared: Arc::new(Shared {
                bus: bus.clone(),
                store,
                role: role.to_owned(),
                says: format!("{role} {life} {}", host.unwrap_or_default()),
                lease,
                mine: Mutex::new(mine),
                live: watch::Sender::new(BTreeSet::new()),
                released: CancellationToken::new(),
            }),
        };
        holders.renew().await?;
        if let Some(host) = host
            && let Some(other) = holders.elsewhere(host).await?
        {
            holders.release().await;
            return Err(BusError::Refused {
                operation: "take a lease",
                detail: format!(
                    "the engine's builders are bound to this host, and {other} is bound to another"
                ),
            });
        }
        for work in [true, false] {
            let holders = holders.clone();
            tasks.spawn(async move {
                let released = holders.shared.released.clone();
                tokio::select! {
                    () = released.cancelled() => {}
                    () = holders.keep_renewing(), if work => {}
                    () = holders.keep_watching(), if !work => {}
                }
            });
        }
        Ok(holders)
    }

    /// Who we are, while we may act. `None` while the lease could not be renewed for two thirds of it; after it has lapsed, a new
    /// instance, without the old one's claims.
    pub fn me(&self) -> Option<InstanceId> {
        let mine = self.mine();
        (mine.revision > 0 && mine.renewed.elapsed() < self.shared.lease.act_for())
            .then(|| mine.instance.clone())
    }

    /// Every live instance of our own role, ourselves included.
    pub fn live(&self) -> Vec<InstanceId> {
        let mut live: Vec<_> = self
            .shared
            .live
            .borrow()
            .iter()
            .filter(|other| other.role() == self.shared.role)
            .cloned()
            .collect();
        let mine = self.mine().instance.clone();
        if !live.contains(&mine) {
            live.push(mine);
        }
        live
    }

    /// Whether an instance's lease was seen to live. A hint; see [`Holders::confirm_dead`].
    pub fn is_live(&self, instance: &InstanceId) -> bool {
        self.shared.live.borrow().contains(instance) || self.mine().instance == *instance
    }

    /// Told whenever somebody comes or goes.
    pub fn changes(&self) -> watch::Receiver<BTreeSet<InstanceId>> {
        self.shared.live.subscribe()
    }

    /// Asks the bucket's leader whether an instance is dead, so that what it claimed may be taken over. `false` also
    /// while we ourselves were cut off a moment ago.
    pub async fn confirm_dead(&self, instance: &InstanceId) -> Result<bool, BusError> {
        {
            let mine = self.mine();
            if mine.instance == *instance
                || mine.settled > Instant::now()
                || mine.renewed.elapsed() >= self.shared.lease.act_for()
            {
                return Ok(false);
            }
        }
        match self.shared.store.stream.get_last_raw_message_by_subject(&key(instance)).await {
            Ok(message) => {
                // A marker that the server left when the lease lapsed, or our own delete.
                let dead = message.headers.get("KV-Operation").is_some()
                    || message.headers.get("Nats-Marker-Reason").is_some();
                Ok(dead)
            }
            Err(error) if matches!(error.kind(), LastRawMessageErrorKind::NoMessageFound) => Ok(true),
            Err(error) => Err(BusError::unavailable("read a lease", error)),
        }
    }

    /// Ends the lease, so that others may take over at once. Nothing is renewed any more.
    pub async fn release(&self) {
        self.shared.released.cancel();
        let instance = self.mine().instance.clone();
        let ended = tokio::time::timeout(PATIENCE, self.shared.store.delete(instance.as_str())).await;
        if !matches!(ended, Ok(Ok(()))) {
            tracing::warn!("the lease of {instance} could not be ended; it will lapse: {ended:?}");
        }
    }

    /// A live instance that is bound to another host than `host`, if there is one.
    async fn elsewhere(&self, host: &str) -> Result<Option<InstanceId>, BusError> {
        let leases = leases(&self.shared.store).await?;
        Ok(leases
            .into_iter()
            .find(|lease| !lease.host.is_empty() && lease.host != host)
            .map(|lease| lease.instance))
    }

    async fn keep_renewing(&self) {
        loop {
            let pause = match self.renew().await {
                Ok(()) => self.shared.lease.renew_every(),
                Err(error) => {
                    tracing::warn!("the lease could not be renewed: {error}");
                    RENEW_AGAIN
                }
            };
            tokio::time::sleep(pause).await;
        }
    }

    async fn renew(&self) -> Result<(), BusError> {
        const RENEW: &str = "renew the lease";
        let lease = self.shared.lease;
        let before = self.mine().clone();
        let sent = Instant::now();
        if before.revision > 0 && before.renewed.elapsed() >= lease.ttl() {
            self.begin_anew(sent)?;
            return Err(BusError::Refused {
                operation: RENEW,
                detail: format!("{} has lapsed", before.instance),
            });
        }
        let message = PublishMessage::build()
            .payload(self.shared.says.clone().into())
            .expected_last_subject_sequence(before.revision)
            .ttl(lease.ttl());
        let published = self.shared.bus.js.send_publish(key(&before.instance), message).await;
        let ack = match published {
            Ok(ack) => ack.await,
            Err(error) => Err(error),
        };
        match ack {
            Ok(ack) => {
                let mut mine = self.mine();
                if before.renewed.elapsed() >= lease.act_for() {
                    mine.settled = sent + lease.settle();
                }
                mine.revision = ack.sequence;
                mine.renewed = sent;
                Ok(())
            }
            // Our own renewal whose answer was lost, or the lapse: either way the sequence we knew is gone.
            Err(error) if error.kind() == PublishErrorKind::WrongLastSequence => {
                let last =
                    self.shared.store.stream.get_last_raw_message_by_subject(&key(&before.instance)).await;
                match last {
                    Ok(last)
                        if last.payload == self.shared.says.as_bytes()
                            && last.headers.get("Nats-TTL").is_some() =>
                    {
                        self.mine().revision = last.sequence;
                        Err(BusError::unavailable(RENEW, "an answer was lost"))
                    }
                    Ok(_) => {
                        self.begin_anew(sent)?;
                        Err(BusError::Refused {
                            operation: RENEW,
                            detail: format!("{} has lapsed", before.instance),
                        })
                    }
                    Err(error) => Err(BusError::unavailable(RENEW, error)),
                }
            }
            Err(error) => Err(BusError::unavailable(RENEW, error)),
        }
    }

    fn begin_anew(&self, now: Instant) -> Result<(), BusError> {
        let instance = new_instance(&self.shared.role)?;
        let mut mine = self.mine();
        tracing::warn!(
            "the lease of {} has lapsed: going on as {instance}, without its claims",
            mine.instance
        );
        *mine = Mine { instance, revision: 0, renewed: now, settled: now + self.shared.lease.settle() };
        Ok(())
    }

    async fn keep_watching(&self) {
        loop {
            if let Err(error) = self.watch_once().await {
                tracing::warn!("the watch of the leases was cut off: {error}");
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }

    async fn watch_once(&self) -> Result<(), BusError> {
        let failed = |error: &dyn std::fmt::Display| BusError::unavailable("watch leases", error);
        let mut watch = self.shared.store.watch_with_history(">").await.map_err(|error| failed(&error))?;
        let mut seen = BTreeSet::new();
        while let Some(entry) = watch.next().await {
            let entry = entry.map_err(|error| failed(&error))?;
            let Ok(instance) = entry.key.parse::<InstanceId>() else { continue };
            match entry.operation {
                Operation::Put => seen.insert(instance),
                Operation::Delete | Operation::Purge => seen.remove(&instance),
            };
            if !entry.seen_current {
                // Still reading what was there: who hasn't been read yet is not gone.
                continue;
            }
            self.shared.live.send_if_modified(|live| {
                let changed = *live != seen;
                live.clone_from(&seen);
                changed
            });
        }
        Ok(())
    }

    fn mine(&self) -> MutexGuard<'_, Mine> {
        self.shared.mine.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Bus {
    /// Ends the leases of a life that is known to be over, so that what it held may be taken over at once.
    pub async fn end_leases(&self, life: &str) -> Result<(), BusError> {
        let failed =
            |error: &dyn std::fmt::Display| BusError::unavailable("end the leases of a former life", error);
        let store = self.js.get_key_value(bucket::HOLDERS).await.map_err(|error| failed(&error))?;
        for lease in leases(&store).await?.into_iter().filter(|lease| lease.life == life) {
            store.delete(lease.instance.as_str()).await.map_err(|error| failed(&error))?;
        }
        Ok(())
    }
}

/// A lease as it lies in the bucket.
pub(crate) struct Held {
    pub(crate) instance: InstanceId,
    life: String,
    pub(crate) host: String,
}

pub(crate) async fn leases(store: &Store) -> Result<Vec<Held>, BusError> {
    let failed = |error: &dyn std::fmt::Display| BusError::unavailable("read the leases", error);
    let mut keys = store.keys().await.map_err(|error| failed(&error))?;
    let mut leases = Vec::new();
    while let Some(key) = keys.next().await {
        let key = key.map_err(|error| failed(&error))?;
        let Some(says) = store.get(key.as_str()).await.map_err(|error| failed(&error))? else { continue };
        let Ok(instance) = key.parse() else { continue };
        let says = String::from_utf8_lossy(&says).into_owned();
        let mut words = says.split(' ').skip(1).map(ToOwned::to_owned);
        let (life, host) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        leases.push(Held { instance, life, host });
    }
    Ok(leases)
}

fn key(instance: &InstanceId) -> String {
    format!("$KV.{}.{instance}", bucket::HOLDERS)
}

fn new_instance(role: &str) -> Result<InstanceId, BusError> {
    InstanceId::new(role, rand::random()).map_err(|error| BusError::malformed("name the instance", error))
}
