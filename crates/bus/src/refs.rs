//! `KILN_REFS`: the resolver's answers, shared by its replicas. Here they are bytes under a key.
//!
//! It is a cache: an entry may be gone at any time (the bucket keeps a day and a bounded size), and a failed write
//! loses nothing but a question to a registry.

use std::fmt::Write as _;

use bytes::Bytes;
use kiln_contract::bucket;

use crate::connection::Bus;
use crate::error::BusError;

/// The bucket.
#[derive(Clone)]
pub struct RefsBucket {
    bus: Bus,
    store: async_nats::jetstream::kv::Store,
}

/// The name of an entry: a sha256, so that no text of a request becomes part of a subject.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RefKey(pub [u8; 32]);

impl RefKey {
    fn subject_token(&self) -> String {
        let mut token = String::with_capacity(64);
        for byte in self.0 {
            // Writing to a String can't fail.
            let _ = write!(token, "{byte:02x}");
        }
        token
    }
}

impl RefsBucket {
    /// The bucket that [`Bus::provision`] made.
    pub async fn open(bus: &Bus) -> Result<Self, BusError> {
        let store = bus.call("open the bucket of references", bus.js.get_key_value(bucket::REFS)).await?;
        Ok(Self { bus: bus.clone(), store })
    }

    /// Keeps an answer. Whoever writes last wins.
    pub async fn put(&self, key: &RefKey, answer: Bytes) -> Result<(), BusError> {
        let put = self.store.put(key.subject_token(), answer);
        self.bus.call("keep a resolved reference", put).await.map(|_| ())
    }

    /// Removes an answer that isn't true any more.
    pub async fn remove(&self, key: &RefKey) -> Result<(), BusError> {
        self.bus.call("remove a resolved reference", self.store.purge(key.subject_token())).await
    }

    /// An answer that some replica kept; `None` if there is none. On a cluster it may be an older one.
    pub async fn get(&self, key: &RefKey) -> Result<Option<Bytes>, BusError> {
        self.bus.call("read a resolved reference", self.store.get(key.subject_token())).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_64_hex_digits() {
        let token = RefKey([0x0a; 32]).subject_token();
        assert_eq!(token, "0a".repeat(32));
    }
}
