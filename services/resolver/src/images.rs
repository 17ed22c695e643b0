//! What an image reference is now, from the cache where that is good enough, else from its registry.
//!
//! What a tag points at is asked by HEAD, which rate limits mostly don't count; a manifest is read only where that is not
//! the digest whose manifest was read before. So to revalidate an unchanged tag costs one HEAD.
//!
//! Of many who ask the same at once, one asks the registry: in this process by a flight that the others join, among
//! replicas by a claim, whose holder's answer the others wait for, though not for long.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use jiff::Timestamp;
use kiln_bus::refs::{Claim, RefKey};
use kiln_credentials::{Installation, Owner, Permitted};
use kiln_domain::platform::Platform;
use kiln_domain::reference::{Digest, ImageReference};
use kiln_domain::registries::Registries;
use kiln_registry::{Access, Error as RegistryError, Problem, Registry};
use moka::future::Cache;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::cache::{Answer, Answers, Claimed};
use crate::config::Config;
use crate::keys::{Asker, Keys};
use crate::metrics::{From, Metrics};
use crate::pause::{Left, Pauses};
use crate::turns::Turns;

/// How long is tried again what may pass, where no older answer could be given: someone waits.
const PATIENCE: Duration = Duration::from_secs(3);
/// How long a mirror may take: whoever waits has better places to ask.
const MIRROR_WITHIN: Duration = Duration::from_secs(3);
/// How long a mirror that was out of reach is passed over.
const MIRROR_SPARED: Duration = Duration::from_secs(10);
/// How long another replica's answer is waited for; then this one asks, too.
const JOIN_WITHIN: Duration = Duration::from_secs(3);
/// How long a claim stands whose holder died.
const CLAIMED_FOR: Duration = Duration::from_secs(5);
/// Waits between two looks for another replica's answer: the first, and the longest.
const LOOK_AGAIN: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(200));

/// What answers come from.
pub(crate) struct Asked {
    pub(crate) registry: Arc<dyn Registry>,
    pub(crate) registries: Registries,
    pub(crate) installation: Arc<Installation>,
    pub(crate) answers: Answers,
}

pub(crate) struct Images {
    registry: Arc<dyn Registry>,
    registries: Registries,
    installation: Arc<Installation>,
    answers: Answers,
    /// Holds nothing: equal questions that are under way wait here for one load.
    flights: Cache<RefKey, Resolved>,
    /// Images that were not there a moment ago, by name, for the news that one is made.
    missing: Cache<RefKey, String>,
    /// How often such news came: who asked before it can't tell what is missing after it.
    news: AtomicU64,
    pauses: Pauses,
    turns: Turns,
    keys: Keys,
    metrics: Metrics,
    tag_fresh_for: Duration,
    serve_stale_for: Duration,
    registry_timeout: Duration,
    revalidate_timeout: Duration,
}

/// An image that somebody wants resolved.
#[derive(Clone)]
pub(crate) struct Wanted {
    pub(crate) reference: ImageReference,
    pub(crate) platform: Platform,
    /// What the caller may use.
    pub(crate) credentials: Arc<Permitted>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Resolved {
    pub(crate) digest: Digest,
    /// The registry could not be asked, and the answer is older than what counts as fresh.
    pub(crate) stale: bool,
    pub(crate) age: Duration,
    /// Which mirror said so; empty where it was the registry itself.
    pub(crate) mirror: String,
    /// It was known: nobody was asked for it now.
    pub(crate) cached: bool,
    /// How long it is as good as asked anew.
    pub(crate) fresh_for: Duration,
}

/// Who asks the registry.
enum Turn {
    Ask(Option<Claim>),
    /// Another replica did.
    Answered(Answer),
}

/// A registry's pause, for the other replicas.
#[derive(Serialize, Deserialize)]
struct PauseNote {
    until: Timestamp,
    limited: bool,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Registry(#[from] RegistryError),
    #[error("registry {registry} asked not to be asked for another {} s", .left.as_secs().max(1))]
    Paused { registry: String, left: Duration, limited: bool },
}

impl Error {
    /// The registry's trouble, not the question's: an older answer is better than none.
    fn cannot_be_asked(&self) -> bool {
        match self {
            Self::Paused { .. } => true,
            Self::Registry(error) => {
                matches!(
                    error,
                    RegistryError::NoCredential { .. }
                        | RegistryError::Limited { .. }
                        | RegistryError::Unavailable { .. }
                )
            }
        }
    }

    /// The registry's word that what was known isn't so any more, or not for this caller.
    fn refutes(&self) -> bool {
        use RegistryError::{Denied, NoPlatform, NotFound, Unauthenticated};
        let Self::Registry(error) = self else { return false };
        matches!(error, NotFound { .. } | Unauthenticated { .. } | Denied { .. } | NoPlatform { .. })
    }
}

impl Images {
    pub(crate) fn new(
        config: &Config,
        Asked { registry, registries, installation, answers }: Asked,
        keys: Keys,
        metrics: Metrics,
    ) -> Self {
        Self {
            registry,
            registries,
            installation,
            answers,
            flights: Cache::new(0),
            missing: Cache::builder()
                .max_capacity(config.cached_images)
                .time_to_live(config.not_found_for())
                .support_invalidation_closures()
                .build(),
            news: AtomicU64::new(0),
            pauses: Pauses::default(),
            turns: Turns::new(config.registry_at_once),
            keys,
            metrics,
            tag_fresh_for: config.tag_fresh_for(),
            serve_stale_for: config.serve_stale_for(),
            registry_timeout: config.registry_timeout(),
            revalidate_timeout: config.revalidate_timeout(),
        }
    }

    /// The digest of an image for its platform. With `refresh` it is what the registry says from now on: no fresh answer is
    /// taken, and no question joined that was asked before.
    pub(crate) async fn resolve(&self, wanted: &Wanted, refresh: bool) -> Result<Resolved, Arc<Error>> {
        let key = self.key(wanted).await;
        if refresh {
            return self.load(&key, wanted, true).await.map_err(Arc::new);
        }
        if let Some(fresh) = self.answers.here(&key).await.and_then(|known| self.fresh(wanted, &known)) {
            self.metrics.image_answered(From::Cache);
            return Ok(fresh);
        }
        if let Some(reference) = self.missing.get(&key).await {
            self.metrics.image_answered(From::Missing);
            return Err(Arc::new(RegistryError::NotFound { reference }.into()));
        }
        self.flights.try_get_with(key, self.load(&key, wanted, false)).await
    }

    /// These are there now.
    pub(crate) fn made(&self, references: Vec<String>) {
        self.news.fetch_add(1, Ordering::SeqCst);
        let made = move |_: &RefKey, missing: &String| references.contains(missing);
        if let Err(error) = self.missing.invalidate_entries_if(made) {
            tracing::error!("an image that was made can't be forgotten to be missing: {error}");
        }
    }

    /// What lies at a reference of this installation right now, by the registry's own word: not cached, not joined.
    pub(crate) async fn find(&self, reference: &ImageReference) -> Result<Option<Digest>, Error> {
        let mut access = Access::new(self.installation.clone(), Instant::now() + self.registry_timeout);
        access.patience = PATIENCE;
        self.hear_of_pauses(reference.registry()).await;
        self.ask(reference, &access, self.registry.digest(reference, &access)).await
    }

    async fn key(&self, wanted: &Wanted) -> RefKey {
        let registry = wanted.reference.registry();
        let (reference, platform) = (wanted.reference.to_string(), wanted.platform.to_string());
        let mut texts = vec![reference, platform];
        // What a mirror answers may depend on what it is shown.
        for mirror in self.registries.mirrors(registry) {
            texts.push(mirror.to_owned());
            match wanted.credentials.owner(mirror).await {
                Owner::Nobody => texts.push("anonymous".into()),
                Owner::Installation => texts.push("installation".into()),
                Owner::Request(own) => texts.extend(own.distinguishing().map(str::to_owned)),
            }
        }
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        let owner = wanted.credentials.owner(registry).await;
        let asker = match &owner {
            Owner::Nobody => Asker::Anonymous,
            Owner::Installation => Asker::Installation,
            Owner::Request(own) => Asker::Shows(own.distinguishing()),
        };
        RefKey(self.keys.of("image", &texts, &asker))
    }

    /// The answer that is known, if it needs no question.
    fn fresh(&self, wanted: &Wanted, known: &Answer) -> Option<Resolved> {
        let resolved = self.resolved(wanted, known.clone(), true);
        (!resolved.fresh_for.is_zero()).then_some(resolved)
    }

    fn resolved(&self, wanted: &Wanted, answer: Answer, cached: bool) -> Resolved {
        let age = answer.age(now());
        // What a digest stands for can't change.
        let fresh_for = match wanted.reference.digest() {
            Some(_) => Duration::MAX,
            None => self.tag_fresh_for.saturating_sub(age),
        };
        Resolved { digest: answer.digest, stale: false, age, mirror: answer.mirror, cached, fresh_for }
    }

    async fn load(&self, key: &RefKey, wanted: &Wanted, refresh: bool) -> Result<Resolved, Error> {
        // Another replica may know better; and what was asked before us may have been answered meanwhile.
        let (known, ()) =
            tokio::join!(self.answers.anywhere(key), self.hear_of_pauses(wanted.reference.registry()));
        if !refresh && let Some(fresh) = known.as_ref().and_then(|known| self.fresh(wanted, known)) {
            self.metrics.image_answered(From::Cache);
            return Ok(fresh);
        }
        let claim = if refresh {
            None
        } else {
            match self.turn(key, known.as_ref()).await {
                Turn::Ask(claim) => claim,
                Turn::Answered(answer) => {
                    self.metrics.image_answered(From::Replica);
                    return Ok(self.resolved(wanted, answer, false));
                }
            }
        };
        let known = known.filter(|known| known.age(now()) <= self.serve_stale_for);
        let loaded = self.load_from_registry(key, wanted, known).await;
        if let Some(claim) = claim {
            self.answers.release(claim).await;
        }
        loaded
    }

    /// Claims the question, or waits for the answer of the replica that has claimed it.
    async fn turn(&self, key: &RefKey, known: Option<&Answer>) -> Turn {
        let claim = RefKey(self.keys.beside("claim", &key.0));
        let (give_up, mut pause) = (Instant::now() + JOIN_WITHIN, LOOK_AGAIN.0);
        loop {
            let until = now().checked_add(CLAIMED_FOR).unwrap_or_else(|_| now());
            match self.answers.claim(&claim, now(), until).await {
                Claimed::Ours(claim) => return Turn::Ask(claim),
                Claimed::Another if Instant::now() >= give_up => return Turn::Ask(None),
                Claimed::Another => {}
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LOOK_AGAIN.1);
            let newer = |answer: &Answer| known.is_none_or(|known| answer.asked_at > known.asked_at);
            if let Some(answer) = self.answers.anywhere(key).await.filter(newer) {
                return Turn::Answered(answer);
            }
        }
    }

    async fn load_from_registry(
        &self,
        key: &RefKey,
        wanted: &Wanted,
        known: Option<Answer>,
    ) -> Result<Resolved, Error> {
        let news = self.news.load(Ordering::SeqCst);
        match self.ask_registry(wanted, known.as_ref()).await {
            Ok(answer) => {
                self.missing.invalidate(key).await;
                let from = if answer.mirror.is_empty() { From::Registry } else { From::Mirror };
                let newest = self.answers.keep(key, answer).await;
                self.metrics.image_answered(from);
                Ok(self.resolved(wanted, newest, false))
            }
            Err(error) if error.cannot_be_asked() => match known {
                Some(known) => {
                    tracing::warn!("an older answer is given for {}: {error}", wanted.reference);
                    self.metrics.image_answered(From::Stale);
                    let resolved = self.resolved(wanted, known, true);
                    Ok(Resolved { stale: true, fresh_for: Duration::ZERO, ..resolved })
                }
                None => Err(error),
            },
            Err(error) => {
                if known.is_some() && error.refutes() {
                    self.answers.forget(key).await;
                }
                if let Error::Registry(RegistryError::NotFound { reference }) = &error
                    && self.news.load(Ordering::SeqCst) == news
                {
                    self.missing.insert(*key, reference.clone()).await;
                }
                Err(error)
            }
        }
    }

    /// Asks the mirrors in their order, then the registry itself, whose word is the last.
    async fn ask_registry(&self, wanted: &Wanted, known: Option<&Answer>) -> Result<Answer, Error> {
        let begun = Instant::now();
        let (time, patience) = match known {
            Some(_) => (self.revalidate_timeout, Duration::ZERO),
            None => (self.registry_timeout, PATIENCE),
        };
        let mut access = Access::new(wanted.credentials.clone(), begun + time);
        let mirrored = self.registries.mirrored(&wanted.reference);
        let shares = u32::try_from(mirrored.len()).unwrap_or(u32::MAX).saturating_add(1);
        let share = (time / shares).min(MIRROR_WITHIN);
        for reference in &mirrored {
            // A slow mirror leaves the others, and the registry, their share of the time.
            access.deadline = Instant::now() + share;
            access.patience = Duration::ZERO;
            match self.ask_at(reference, wanted, known, &access).await {
                Ok(answer) => return Ok(Answer { mirror: reference.registry().to_owned(), ..answer }),
                Err(error) => {
                    tracing::debug!("the mirror's {reference} is passed over: {error}");
                    self.spare_mirror(reference.registry(), &error);
                }
            }
        }
        access.deadline = begun + time;
        access.patience = patience;
        self.ask_at(&wanted.reference, wanted, known, &access).await
    }

    /// A mirror that is out of reach is passed over for a while, so that it costs one question its time, not all.
    fn spare_mirror(&self, mirror: &str, error: &Error) {
        if matches!(
            error,
            Error::Registry(RegistryError::Unavailable { .. } | RegistryError::UnknownHost { .. })
        ) {
            tracing::warn!("mirror {mirror} is passed over for {MIRROR_SPARED:?}: {error}");
            self.pauses.hear(mirror, Left { time: MIRROR_SPARED, limited: false });
        }
    }

    /// Asks at one place: a mirror, or the registry itself.
    async fn ask_at(
        &self,
        reference: &ImageReference,
        wanted: &Wanted,
        known: Option<&Answer>,
        access: &Access,
    ) -> Result<Answer, Error> {
        let (asked_at, mirror) = (now(), String::new());
        if let Some(points_at) = reference.digest() {
            let digest = self.read(reference, wanted, access).await?;
            return Ok(Answer { points_at, digest, asked_at, mirror });
        }
        let points_at = self.ask(reference, access, self.registry.digest(reference, access)).await?;
        let points_at =
            points_at.ok_or_else(|| RegistryError::NotFound { reference: reference.to_string() })?;
        if let Some(known) = known.filter(|known| known.points_at == points_at) {
            return Ok(Answer { asked_at, mirror, ..known.clone() });
        }
        // By its digest: the tag may be moved between the two questions.
        let digest = self.read(&reference.pinned(&points_at), wanted, access).await?;
        Ok(Answer { points_at, digest, asked_at, mirror })
    }

    async fn read(&self, pinned: &ImageReference, wanted: &Wanted, access: &Access) -> Result<Digest, Error> {
        self.ask(pinned, access, self.registry.resolve(pinned, &wanted.platform, access)).await
    }

    /// Asks, unless this registry wants to be left alone; and learns from the answer whether it does.
    async fn ask<T>(
        &self,
        reference: &ImageReference,
        access: &Access,
        question: impl Future<Output = Result<T, RegistryError>>,
    ) -> Result<T, Error> {
        let registry = reference.registry();
        let busy = || RegistryError::Unavailable {
            registry: registry.to_owned(),
            problem: Problem::Connection("as many questions as it may be asked at once are under way".into()),
            retry_after: None,
        };
        let place = tokio::time::timeout_at(access.deadline, self.turns.take(registry)).await;
        let _place = place.map_err(|_| busy())?;
        // After the wait: meanwhile a pause may have begun.
        if let Some(left) = self.pauses.left(registry) {
            return Err(Error::Paused { registry: registry.into(), left: left.time, limited: left.limited });
        }
        let answer = question.await;
        if self.pauses.learn(registry, &answer) {
            self.metrics.paused();
            let left = self.pauses.left(registry).map(|left| left.time).unwrap_or_default();
            tracing::warn!(registry, "registry {registry} is not asked for {left:?}: it asked for a pause");
            self.tell_of_pause(registry).await;
        }
        Ok(answer?)
    }

    async fn tell_of_pause(&self, registry: &str) {
        let Some(left) = self.pauses.left(registry) else { return };
        let Ok(until) = now().checked_add(left.time) else { return };
        self.answers.note(&self.pause_key(registry), &PauseNote { until, limited: left.limited }).await;
    }

    /// Of a pause that another replica was asked for.
    async fn hear_of_pauses(&self, registry: &str) {
        if self.pauses.left(registry).is_some() {
            return;
        }
        let Some(note) = self.answers.noted::<PauseNote>(&self.pause_key(registry)).await else { return };
        // One that is over is none.
        if let Ok(time) = Duration::try_from(note.until.duration_since(now())) {
            self.pauses.hear(registry, Left { time, limited: note.limited });
        }
    }

    fn pause_key(&self, registry: &str) -> RefKey {
        RefKey(self.keys.of("pause", &[registry], &Asker::Anonymous))
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "an answer's age must mean the same in every replica: wall-clock time"
)]
fn now() -> Timestamp {
    Timestamp::now()
}
