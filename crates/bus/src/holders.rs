//! Leases: which instances live. A lease only says *when* another may take over; what keeps two from acting is the
//! append.
//!
//! A lease is written by a plain publish with an expected sequence and a time to live, for async-nats's own
//! `create_with_ttl` loses the time to live on a key that has a delete marker.

mod others;

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_nats::jetstream::context::{PublishError, PublishErrorKind};
use async_nats::jetstream::kv::Store;
use async_nats::jetstream::message::{PublishMessage, StreamMessage};
use async_nats::jetstream::stream::{LastRawMessageError, LastRawMessageErrorKind};
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
use crate::seal::SealKey;

const RENEW: &str = "renew the lease";
/// Before a renewal that failed is tried again.
const RENEW_AGAIN: Duration = Duration::from_secs(1);

/// Who takes a lease, and what must not differ between those who live at once.
#[derive(Clone, Copy, Default)]
pub struct Member<'a> {
    pub role: &'a str,
    /// Names the process that the lease lives and dies with, for [`Bus::end_leases`]; empty where nobody will know.
    pub life: &'a str,
    /// Where its engine's builders are, if they are bound to one host.
    pub host: Option<&'a str>,
    /// For which secrets are to be sealed that it opens.
    pub seal_key: Option<&'a SealKey>,
}

/// This process's lease, and everybody else's.
#[derive(Clone)]
pub struct Holders {
    shared: Arc<Shared>,
}

struct Shared {
    bus: Bus,
    store: Store,
    role: String,
    /// What the lease says: role, life, host and seal key.
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
    /// Takes a lease for a new instance, and renews it until it is released. It is refused while an instance with
    /// another host or seal key lives.
    pub async fn start(
        bus: &Bus,
        member: Member<'_>,
        lease: Lease,
        tasks: &TaskTracker,
    ) -> Result<Self, BusError> {
        let Member { role, life, host, seal_key } = member;
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
                says: format!(
                    "{role} {life} {} {}",
                    host.unwrap_or_default(),
                    seal_key.map_or("", SealKey::public)
                ),
                lease,
                mine: Mutex::new(mine),
                live: watch::Sender::new(BTreeSet::new()),
                released: CancellationToken::new(),
            }),
        };
        holders.renew().await?;
        let leases = leases(&holders.shared.store).await?;
        if let Some(detail) = leases.iter().find_map(|other| other.differs(host, seal_key)) {
            holders.release().await;
            return Err(BusError::Refused { operation: "take a lease", detail });
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
        match self.last(instance).await? {
            Ok(message) => Ok(is_ended(&message)),
            Err(error) if matches!(error.kind(), LastRawMessageErrorKind::NoMessageFound) => {
                // Where ours is missing too, the bucket was emptied: that says nothing of others.
                let me = self.mine().instance.clone();
                Ok(self.last(&me).await?.is_ok())
            }
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

    async fn keep_renewing(&self) {
        let mut failing = false;
        loop {
            let renewed = self.renew().await;
            let failed = renewed.is_err();
            match (renewed, failing) {
                (Err(error), false) => {
                    tracing::warn!("the lease can't be renewed, trying again each second: {error}")
                }
                (Err(error), true) => tracing::debug!("the lease still can't be renewed: {error}"),
                (Ok(()), true) => tracing::info!("the lease is renewed again"),
                (Ok(()), false) => {}
            }
            failing = failed;
            tokio::time::sleep(if failed { RENEW_AGAIN } else { self.shared.lease.renew_every() }).await;
        }
    }

    async fn renew(&self) -> Result<(), BusError> {
        let before = self.mine().clone();
        let sent = Instant::now();
        if before.revision > 0 && before.renewed.elapsed() >= self.shared.lease.ttl() {
            self.begin_anew(sent)?;
            return Err(BusError::Refused {
                operation: RENEW,
                detail: format!("{} has lapsed", before.instance),
            });
        }
        match self.write(&before.instance, before.revision).await? {
            Ok(revision) => {
                self.renewed(&before, revision, sent, false);
                Ok(())
            }
            // Our own renewal whose answer was lost, or the lapse: either way the sequence we knew is gone.
            Err(error) if error.kind() == PublishErrorKind::WrongLastSequence => {
                match self.last(&before.instance).await? {
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
                    // Not lapsed, which leaves a marker: the bucket was purged, or made anew. Of the others some may not have
                    // written theirs again yet, and are not dead.
                    Err(error) if error.kind() == LastRawMessageErrorKind::NoMessageFound => {
                        let again = self.write(&before.instance, 0).await?;
                        let revision = again.map_err(|error| BusError::unavailable(RENEW, error))?;
                        self.shared.bus.happened(
                            bucket::stream(bucket::HOLDERS),
                            "emptied",
                            format!("somebody emptied it: the lease of {} is written again", before.instance),
                        );
                        self.renewed(&before, revision, sent, true);
                        Ok(())
                    }
                    Err(error) => Err(BusError::unavailable(RENEW, error)),
                }
            }
            Err(error) => Err(BusError::unavailable(RENEW, error)),
        }
    }

    /// Writes a lease on top of its revision, and gives the new one.
    async fn write(
        &self,
        instance: &InstanceId,
        revision: u64,
    ) -> Result<Result<u64, PublishError>, BusError> {
        let message = PublishMessage::build()
            .payload(self.shared.says.clone().into())
            .expected_last_subject_sequence(revision)
            .ttl(self.shared.lease.ttl());
        let written = async {
            let ack = self.shared.bus.js.send_publish(key(instance), message).await?.await?;
            Ok(ack.sequence)
        };
        self.shared.bus.attend(RENEW, written).await
    }

    /// What the bucket's leader holds of an instance.
    async fn last(
        &self,
        instance: &InstanceId,
    ) -> Result<Result<StreamMessage, LastRawMessageError>, BusError> {
        let key = key(instance);
        let last = self.shared.store.stream.get_last_raw_message_by_subject(&key);
        self.shared.bus.attend("read a lease", last).await
    }

    /// `unsettled`: who else lives isn't sure for a while.
    fn renewed(&self, before: &Mine, revision: u64, sent: Instant, unsettled: bool) {
        let mut mine = self.mine();
        if unsettled || before.renewed.elapsed() >= self.shared.lease.act_for() {
            mine.settled = sent + self.shared.lease.settle();
        }
        mine.revision = revision;
        mine.renewed = sent;
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

    fn mine(&self) -> MutexGuard<'_, Mine> {
        self.shared.mine.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Bus {
    /// Refuses a seal key for which who lives can't open what is sealed: what is given to them would be lost.
    pub async fn check_seal_key(&self, key: &SealKey) -> Result<(), BusError> {
        const CHECK: &str = "compare the seal key";
        let store = self.call(CHECK, self.js.get_key_value(bucket::HOLDERS)).await?;
        match leases(&store).await?.iter().find_map(|other| other.differs(None, Some(key))) {
            Some(detail) => Err(BusError::Refused { operation: CHECK, detail }),
            None => Ok(()),
        }
    }

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
    seal_key: String,
}

impl Held {
    /// Why nobody with this host and seal key may be beside it.
    fn differs(&self, host: Option<&str>, seal_key: Option<&SealKey>) -> Option<String> {
        let instance = &self.instance;
        if host.is_some_and(|host| is_elsewhere(&self.host, host)) {
            Some(format!(
                "the engine's builders are bound to this host and `engine.local.folder`, and {instance} is bound to another"
            ))
        } else if seal_key.is_some_and(|key| !self.seal_key.is_empty() && self.seal_key != key.public()) {
            Some(format!(
                "secrets are sealed with another key here (`seal`) than {instance} has: none could open what the other sealed; \
                 all processes of an installation have one"
            ))
        } else {
            None
        }
    }
}

/// `boot/folder`; a lease of an earlier release names the boot alone.
fn is_elsewhere(one: &str, other: &str) -> bool {
    match (one.split_once('/'), other.split_once('/')) {
        _ if one.is_empty() => false,
        (None, Some((boot, _))) => one != boot,
        (Some((boot, _)), None) => other != boot,
        _ => one != other,
    }
}

pub(crate) async fn leases(store: &Store) -> Result<Vec<Held>, BusError> {
    let failed = |error: &dyn std::fmt::Display| BusError::unavailable("read the leases", error);
    let mut keys = store.keys().await.map_err(|error| failed(&error))?;
    let mut leases = Vec::new();
    while let Some(key) = keys.next().await {
        let Ok(instance) = key.map_err(|error| failed(&error))?.parse() else { continue };
        // The leader's word: of two that begin at once each sees the other.
        let last = match store.stream.get_last_raw_message_by_subject(&self::key(&instance)).await {
            Ok(last) if !is_ended(&last) => last,
            Ok(_) => continue,
            Err(error) if error.kind() == LastRawMessageErrorKind::NoMessageFound => continue,
            Err(error) => return Err(failed(&error)),
        };
        let says = String::from_utf8_lossy(&last.payload).into_owned();
        let mut words = says.split(' ').skip(1).map(ToOwned::to_owned);
        let mut word = || words.next().unwrap_or_default();
        leases.push(Held { instance, life: word(), host: word(), seal_key: word() });
    }
    Ok(leases)
}

/// A marker that the server left when the lease lapsed, or its holder's own delete.
fn is_ended(last: &StreamMessage) -> bool {
    ["KV-Operation", "Nats-Marker-Reason"].iter().any(|header| last.headers.get(*header).is_some())
}

fn key(instance: &InstanceId) -> String {
    bucket::subject(bucket::HOLDERS, instance)
}

fn new_instance(role: &str) -> Result<InstanceId, BusError> {
    InstanceId::new(role, rand::random()).map_err(|error| BusError::malformed("name the instance", error))
}
