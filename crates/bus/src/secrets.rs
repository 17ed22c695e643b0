//! `KILN_SECRETS`: a sealed entry for each build that isn't cleaned up yet. Where somebody's hand took an entry, another
//! stands for it, which says that the secrets are lost.

use async_nats::jetstream::kv::{CreateErrorKind, Operation};
use async_nats::jetstream::stream::LastRawMessageErrorKind;
use bytes::Bytes;
use futures::StreamExt as _;
use jiff::Timestamp;
use kiln_contract::bucket;
use kiln_contract::secrets::{OutputAccesses, Secrets};
use kiln_domain::id::BuildId;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::connection::Bus;
use crate::error::BusError;
use crate::seal::{OpenKey, SealError, SealKey};

/// In place of secrets that are lost. Not empty: empty bytes open as no secrets, and a build would be run without its own.
const LOST: &[u8] = b"lost";

/// Seals a request's secrets, for a question or the bucket.
pub fn seal(key: &SealKey, secrets: &Secrets) -> Result<Bytes, SealError> {
    seal_json(key, secrets)
}

/// Opens what [`seal`] made. Empty bytes are no secrets.
pub fn open(key: &OpenKey, sealed: &[u8]) -> Result<Secrets, SealError> {
    if sealed.is_empty() {
        return Ok(Secrets::default());
    }
    open_json(key, sealed)
}

/// Seals what lets read outputs, for who asked.
pub fn seal_accesses(key: &SealKey, accesses: &OutputAccesses) -> Result<Bytes, SealError> {
    seal_json(key, accesses)
}

/// Opens what [`seal_accesses`] made.
pub fn open_accesses(key: &OpenKey, sealed: &[u8]) -> Result<OutputAccesses, SealError> {
    open_json(key, sealed)
}

fn seal_json(key: &SealKey, content: &impl Serialize) -> Result<Bytes, SealError> {
    let json = serde_json::to_vec(content).map_err(|_| SealError::Seal)?;
    key.seal(&json).map(Bytes::from)
}

fn open_json<T: DeserializeOwned>(key: &OpenKey, sealed: &[u8]) -> Result<T, SealError> {
    serde_json::from_slice(&key.open(sealed)?).map_err(|_| SealError::Open)
}

/// The bucket. It never sees an open secret.
#[derive(Clone)]
pub struct SecretsBucket {
    bus: Bus,
    store: async_nats::jetstream::kv::Store,
}

impl SecretsBucket {
    pub async fn open(bus: &Bus) -> Result<Self, BusError> {
        let store = bus.call("open the secrets bucket", bus.js.get_key_value(bucket::SECRETS)).await?;
        Ok(Self { bus: bus.clone(), store })
    }

    /// Keeps a build's sealed secrets.
    pub async fn put(&self, id: &BuildId, sealed: Bytes) -> Result<(), BusError> {
        self.bus.call("keep a build's secrets", self.store.put(id.as_str(), sealed)).await.map(|_| ())
    }

    /// Lists a build whose entry is lost, so that it is cleaned up once it is over. Whether there was none: an entry that is
    /// there stays.
    pub async fn list_without_secrets(&self, id: &BuildId) -> Result<bool, BusError> {
        const LIST: &str = "list a build whose secrets are lost";
        match self.bus.attend(LIST, self.store.create(id.as_str(), Bytes::from_static(LOST))).await? {
            Ok(_) => {
                let why =
                    format!("somebody emptied it: the secrets of `{id}` are lost, and maybe of other builds");
                self.bus.happened(bucket::stream(bucket::SECRETS), "emptied", why);
                Ok(true)
            }
            Err(error) if error.kind() == CreateErrorKind::AlreadyExists => Ok(false),
            Err(error) => Err(BusError::unavailable(LIST, error)),
        }
    }

    /// A build's sealed secrets; `None` if they are lost, or once it is cleaned up.
    pub async fn get(&self, id: &BuildId) -> Result<Option<Bytes>, BusError> {
        Ok(self.entry(id).await?.filter(|sealed| sealed != LOST))
    }

    /// Whether a build isn't cleaned up yet.
    pub async fn lists(&self, id: &BuildId) -> Result<bool, BusError> {
        Ok(self.entry(id).await?.is_some())
    }

    async fn entry(&self, id: &BuildId) -> Result<Option<Bytes>, BusError> {
        const READ: &str = "read a build's secrets";
        let key = bucket::subject(bucket::SECRETS, id);
        // From the leader: a replica may not have yet what was put a moment ago, and a build would fail for it.
        match self.bus.attend(READ, self.store.stream.get_last_raw_message_by_subject(&key)).await? {
            Ok(message) if message.headers.get("KV-Operation").is_some() => Ok(None),
            Ok(message) => Ok(Some(message.payload)),
            Err(error) if matches!(error.kind(), LastRawMessageErrorKind::NoMessageFound) => Ok(None),
            Err(error) => Err(BusError::unavailable(READ, error)),
        }
    }

    /// Since when a build's entry is there; `None` once it is cleaned up.
    pub async fn since(&self, id: &BuildId) -> Result<Option<Timestamp>, BusError> {
        const READ: &str = "look at a build's secrets";
        let entry = self.bus.call(READ, self.store.entry(id.as_str())).await?;
        let put = entry.filter(|entry| entry.operation == Operation::Put);
        put.map(|entry| Timestamp::from_nanosecond(entry.created.unix_timestamp_nanos()))
            .transpose()
            .map_err(|error| BusError::malformed(READ, error))
    }

    /// Removes a build's entry, its old revisions too.
    pub async fn remove(&self, id: &BuildId) -> Result<(), BusError> {
        self.bus.call("remove a build's secrets", self.store.purge(id.as_str())).await
    }

    /// The builds that are not cleaned up yet.
    pub async fn builds(&self) -> Result<Vec<BuildId>, BusError> {
        let list = async {
            let mut keys = self.store.keys().await.map_err(|error| error.to_string())?;
            let mut builds = Vec::new();
            while let Some(key) = keys.next().await {
                // A key that is no build id is not ours.
                builds.extend(key.map_err(|error| error.to_string())?.parse());
            }
            Ok::<_, String>(builds)
        };
        self.bus.call("list builds to clean up", list).await
    }
}
