//! Credentials that end: kept until near their end, and fetched by one question for all who ask at once.

use std::hash::Hash;
use std::time::{Duration, Instant};

use kiln_registry::Credential;
use moka::Expiry;
use moka::future::Cache;

/// A credential, and how long it lasts from when it was fetched.
#[derive(Clone)]
pub(crate) struct Lasting {
    pub(crate) credential: Credential,
    pub(crate) lasts: Duration,
}

pub(crate) struct Kept<K>(Cache<K, Lasting>);

impl<K: Hash + Eq + Send + Sync + 'static> Kept<K> {
    pub(crate) fn new() -> Self {
        Self(Cache::builder().max_capacity(10_000).expire_after(BeforeTheEnd).build())
    }

    pub(crate) async fn get(
        &self,
        key: K,
        fetch: impl Future<Output = Result<Lasting, String>>,
    ) -> Result<Credential, String> {
        let kept = self.0.try_get_with(key, fetch).await;
        kept.map(|kept| kept.credential).map_err(|problem| String::clone(&problem))
    }
}

struct BeforeTheEnd;

impl BeforeTheEnd {
    /// A tenth before its end, so that who gets it has time to use it: more than an hour of an ECR token's twelve.
    fn of(kept: &Lasting) -> Duration {
        kept.lasts - kept.lasts / 10
    }
}

impl<K> Expiry<K, Lasting> for BeforeTheEnd {
    fn expire_after_create(&self, _: &K, kept: &Lasting, _: Instant) -> Option<Duration> {
        Some(Self::of(kept))
    }

    fn expire_after_update(
        &self,
        _: &K,
        kept: &Lasting,
        _: Instant,
        _: Option<Duration>,
    ) -> Option<Duration> {
        Some(Self::of(kept))
    }
}
