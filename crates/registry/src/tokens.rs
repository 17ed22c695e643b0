//! Tokens, kept until they end; and what each repository was seen to demand, so that they are shown at once.

use std::fmt;
use std::time::{Duration, Instant as StdInstant};

use http::HeaderValue;
use moka::Expiry;
use moka::future::Cache;
use sha2::{Digest as _, Sha256};
use tokio::time::Instant;
use url::Url;

use crate::access::Credential;
use crate::challenge::Challenge;
use crate::error::Error;
use crate::http::Http;
use crate::token::{Authorization, Wanted, fetch};

const MOST: u64 = 10_000;
/// A registry may come to demand something else: then what is shown unasked is of no use.
const DEMANDED_FOR: Duration = Duration::from_secs(10 * 60);

/// A hash, so that no secret lies in a key.
type Key = [u8; 32];

/// What one [`OciRegistry`](crate::OciRegistry) keeps between two calls.
pub(crate) struct Tokens {
    kept: Cache<Key, Authorization>,
    /// By place alone: a challenge is the same for everyone, and nothing secret.
    demanded: Cache<Key, Challenge>,
}

impl Default for Tokens {
    fn default() -> Self {
        Self {
            kept: Cache::builder().max_capacity(MOST).expire_after(UntilItsEnd).build(),
            demanded: Cache::builder().max_capacity(MOST).time_to_live(DEMANDED_FOR).build(),
        }
    }
}

impl Tokens {
    /// The token for what is wanted; fetched if none is kept but `rejected`, by one question for all who ask at once.
    pub(crate) async fn token(
        &self,
        http: &Http,
        wanted: &Wanted<'_>,
        rejected: Option<&HeaderValue>,
    ) -> Result<Authorization, Error> {
        let key = key_of(wanted);
        if let Some(kept) = self.kept.get(&key).await
            && rejected == Some(&kept.value)
        {
            self.kept.invalidate(&key).await;
        }
        // Who asked first may give up: then another one's question takes its place.
        let fetched = self.kept.try_get_with(key, fetch(http, wanted)).await;
        fetched.map_err(|error| Error::clone(&error))
    }

    pub(crate) async fn demanded(&self, base: &Url, scopes: &[String]) -> Option<Challenge> {
        self.demanded.get(&place(base, scopes)).await
    }

    pub(crate) async fn demands(&self, base: &Url, scopes: &[String], challenge: Challenge) {
        self.demanded.insert(place(base, scopes), challenge).await;
    }

    pub(crate) async fn forget_demand(&self, base: &Url, scopes: &[String]) {
        self.demanded.invalidate(&place(base, scopes)).await;
    }
}

impl fmt::Debug for Tokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tokens(…)")
    }
}

/// All that a token depends on: another credential, or none, is another key.
fn key_of(wanted: &Wanted<'_>) -> Key {
    let [kind, user, secret] = wanted.credential.map_or(["anonymous", "", ""], Credential::distinguishing);
    let service = wanted.service.unwrap_or_default();
    let texts = [wanted.base.as_str(), wanted.realm, service, kind, user, secret];
    hashed(texts.into_iter().chain(wanted.scopes.iter().map(String::as_str)))
}

fn place(base: &Url, scopes: &[String]) -> Key {
    hashed(std::iter::once(base.as_str()).chain(scopes.iter().map(String::as_str)))
}

fn hashed<'a>(texts: impl Iterator<Item = &'a str>) -> Key {
    let mut hash = Sha256::new();
    for text in texts {
        // With its length before it, no text can reach into the next one's place.
        hash.update((text.len() as u64).to_be_bytes());
        hash.update(text);
    }
    hash.finalize().into()
}

struct UntilItsEnd;

impl Expiry<Key, Authorization> for UntilItsEnd {
    fn expire_after_create(&self, _: &Key, token: &Authorization, _: StdInstant) -> Option<Duration> {
        left(token)
    }

    fn expire_after_update(
        &self,
        _: &Key,
        token: &Authorization,
        _: StdInstant,
        _: Option<Duration>,
    ) -> Option<Duration> {
        left(token)
    }
}

fn left(token: &Authorization) -> Option<Duration> {
    token.until.map(|until| until.saturating_duration_since(Instant::now()))
}
