//! Answers of registries, kept in this process and in the bucket that all replicas share.
//!
//! The bucket is a help, not a need: where it doesn't answer at once, the registry is asked instead.

use std::time::Duration;

use jiff::Timestamp;
use kiln_bus::refs::{RefKey, RefsBucket};
use kiln_domain::reference::Digest;
use moka::future::Cache;
use moka::ops::compute::Op;
use serde::{Deserialize, Serialize};

/// The bucket is a local store: longer, and it is the bus that is in trouble.
const BUCKET_WITHIN: Duration = Duration::from_millis(300);

/// What a registry said.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Answer {
    /// What the reference pointed at: a manifest, or an index of them.
    pub(crate) points_at: Digest,
    /// The manifest for the platform that was asked for.
    pub(crate) digest: Digest,
    /// When it was asked.
    pub(crate) asked_at: Timestamp,
}

impl Answer {
    /// How long ago it was. Another replica's clock may be ahead of ours: then it is just now.
    pub(crate) fn age(&self, now: Timestamp) -> Duration {
        Duration::try_from(now.duration_since(self.asked_at)).unwrap_or_default()
    }
}

pub(crate) struct Answers {
    here: Cache<RefKey, Answer>,
    shared: RefsBucket,
}

impl Answers {
    pub(crate) fn new(capacity: u64, shared: RefsBucket) -> Self {
        Self { here: Cache::new(capacity), shared }
    }

    /// The newest answer that this process knows.
    pub(crate) async fn here(&self, key: &RefKey) -> Option<Answer> {
        self.here.get(key).await
    }

    /// The newest answer that any replica knows.
    pub(crate) async fn anywhere(&self, key: &RefKey) -> Option<Answer> {
        let read = tokio::time::timeout(BUCKET_WITHIN, self.shared.get(key)).await;
        let shared = match read {
            Ok(Ok(bytes)) => bytes.and_then(|bytes| serde_json::from_slice::<Answer>(&bytes).ok()),
            Ok(Err(error)) => {
                tracing::warn!("the shared answers can't be read: {error}");
                None
            }
            Err(_) => {
                tracing::warn!("the shared answers can't be read within {BUCKET_WITHIN:?}");
                None
            }
        };
        match shared {
            Some(answer) => Some(self.keep_here(key, answer).await),
            None => self.here(key).await,
        }
    }

    /// Keeps an answer, unless a newer one is there; returns the newer of the two.
    pub(crate) async fn keep(&self, key: &RefKey, answer: Answer) -> Answer {
        let newest = self.keep_here(key, answer.clone()).await;
        if newest == answer
            && let Ok(bytes) = serde_json::to_vec(&answer)
        {
            let written = tokio::time::timeout(BUCKET_WITHIN, self.shared.put(key, bytes.into())).await;
            report("kept", written);
        }
        newest
    }

    /// Forgets an answer that isn't true any more.
    pub(crate) async fn forget(&self, key: &RefKey) {
        self.here.invalidate(key).await;
        report("removed", tokio::time::timeout(BUCKET_WITHIN, self.shared.remove(key)).await);
    }

    async fn keep_here(&self, key: &RefKey, answer: Answer) -> Answer {
        let kept = self.here.entry(*key).and_compute_with(|known| {
            let newer_known = known.is_some_and(|known| known.value().asked_at > answer.asked_at);
            std::future::ready(if newer_known { Op::Nop } else { Op::Put(answer.clone()) })
        });
        kept.await.into_entry().map_or(answer, |entry| entry.into_value())
    }
}

fn report<E: std::fmt::Display>(done: &str, result: Result<Result<(), E>, tokio::time::error::Elapsed>) {
    match result {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::warn!("an answer can't be {done} for the other replicas: {error}"),
        Err(_) => tracing::warn!("an answer can't be {done} for the other replicas within {BUCKET_WITHIN:?}"),
    }
}
