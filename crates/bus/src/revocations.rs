//! `KILN_REVOCATIONS`: which runs must not be started any more, where the place that runs them would forget it.

use async_nats::jetstream::stream::LastRawMessageErrorKind;
use bytes::Bytes;
use kiln_contract::bucket;
use kiln_domain::id::RunId;

use crate::connection::Bus;
use crate::error::BusError;

/// The bucket: a word for each run. It keeps them for two days.
#[derive(Clone)]
pub struct RevocationsBucket {
    bus: Bus,
    store: async_nats::jetstream::kv::Store,
}

impl RevocationsBucket {
    /// The bucket that [`Bus::provision`] made.
    pub async fn open(bus: &Bus) -> Result<Self, BusError> {
        let store =
            bus.call("open the bucket of revocations", bus.js.get_key_value(bucket::REVOCATIONS)).await?;
        Ok(Self { bus: bus.clone(), store })
    }

    /// Returns once it is stored.
    pub async fn put(&self, run: &RunId, word: &'static str) -> Result<(), BusError> {
        let put = self.store.put(run.as_str(), Bytes::from_static(word.as_bytes()));
        self.bus.call("revoke a run", put).await.map(|_| ())
    }

    /// What was said of a run last, from the leader: a replica may not have it yet, and a builder would be started for that.
    pub async fn get(&self, run: &RunId) -> Result<Option<Bytes>, BusError> {
        const READ: &str = "look whether a run is revoked";
        let key = bucket::subject(bucket::REVOCATIONS, run);
        match self.bus.attend(READ, self.store.stream.get_last_raw_message_by_subject(&key)).await? {
            Ok(message) => Ok(Some(message.payload)),
            Err(error) if matches!(error.kind(), LastRawMessageErrorKind::NoMessageFound) => Ok(None),
            Err(error) => Err(BusError::unavailable(READ, error)),
        }
    }
}
