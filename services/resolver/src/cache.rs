//! Answers of registries, kept in this process and in the bucket that all replicas share.
//!
//! The bucket is a help, not a need: where it doesn't answer at once, the registry is asked instead.

use std::time::Duration;

use jiff::Timestamp;
use kiln_bus::refs::{Claim, RefKey, RefsBucket};
use kiln_domain::reference::Digest;
use moka::future::Cache;
use moka::ops::compute::Op;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// The bucket is a local store: longer, and it is the bus that is in trouble.
const BUCKET_WITHIN: Duration = Duration::from_millis(300);

/// Longer than that for a claim: it spares a registry, which takes longer still.
const CLAIM_WITHIN: Duration = Duration::from_secs(2);

/// What a registry said.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Answer {
    /// What the reference pointed at: a manifest, or an index of them.
    pub(crate) points_at: Digest,
    /// The manifest for the platform that was asked for.
    pub(crate) digest: Digest,
    /// When it was asked.
    pub(crate) asked_at: Timestamp,
    /// The mirror that said so; empty where it was the registry itself.
    #[serde(default)]
    pub(crate) mirror: String,
}

impl Answer {
    /// How long ago it was. Another replica's clock may be ahead of ours: then it is just now.
    pub(crate) fn age(&self, now: Timestamp) -> Duration {
        Duration::try_from(now.duration_since(self.asked_at)).unwrap_or_default()
    }
}

/// Whose turn it is to ask a registry.
pub(crate) enum Claimed {
    Ours(Option<Claim>),
    Another,
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
        match self.noted(key).await {
            Some(answer) => Some(self.keep_here(key, answer).await),
            None => self.here(key).await,
        }
    }

    /// What the replicas told each other under a key.
    pub(crate) async fn noted<T: DeserializeOwned>(&self, key: &RefKey) -> Option<T> {
        let read = tokio::time::timeout(BUCKET_WITHIN, self.shared.get(key)).await;
        match read {
            Ok(Ok(bytes)) => bytes.and_then(|bytes| serde_json::from_slice(&bytes).ok()),
            Ok(Err(error)) => {
                tracing::warn!("the shared answers can't be read: {error}");
                None
            }
            Err(_) => {
                tracing::warn!("the shared answers can't be read within {BUCKET_WITHIN:?}");
                None
            }
        }
    }

    /// Tells the other replicas something.
    pub(crate) async fn note<T: Serialize>(&self, key: &RefKey, note: &T) {
        if let Ok(bytes) = serde_json::to_vec(note) {
            report("kept", tokio::time::timeout(BUCKET_WITHIN, self.shared.put(key, bytes.into())).await);
        }
    }

    /// Keeps an answer, unless a newer one is there; returns the newer of the two.
    pub(crate) async fn keep(&self, key: &RefKey, answer: Answer) -> Answer {
        let newest = self.keep_here(key, answer.clone()).await;
        if newest == answer {
            self.note(key, &answer).await;
        }
        newest
    }

    /// Forgets an answer that isn't true any more.
    pub(crate) async fn forget(&self, key: &RefKey) {
        self.here.invalidate(key).await;
        report("removed", tokio::time::timeout(BUCKET_WITHIN, self.shared.remove(key)).await);
    }

    /// A claim on asking the registry. Where the bucket can't say, it is ours.
    pub(crate) async fn claim(&self, key: &RefKey, now: Timestamp, until: Timestamp) -> Claimed {
        match tokio::time::timeout(CLAIM_WITHIN, self.shared.claim(key, now, until)).await {
            Ok(Ok(Some(claim))) => Claimed::Ours(Some(claim)),
            Ok(Ok(None)) => Claimed::Another,
            Ok(Err(error)) => {
                tracing::warn!("replicas can't agree on who asks a registry: {error}");
                Claimed::Ours(None)
            }
            Err(_) => Claimed::Ours(None),
        }
    }

    pub(crate) async fn release(&self, claim: Claim) {
        report("released", tokio::time::timeout(BUCKET_WITHIN, self.shared.release(claim)).await);
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
