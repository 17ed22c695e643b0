//! One image that is kept warm.

use std::time::Duration;

use kiln_bus::Bus;
use kiln_contract::error::Refusal;
use kiln_contract::resolver::{ResolveImage, ResolvedImage};
use kiln_domain::reference::ImageReference;
use tokio::time::{Instant, sleep, sleep_until};

use crate::budget::Budget;
use crate::config::Config;
use crate::metrics::{Image, Metrics};
use crate::shelf::Shelf;

/// An image that nobody can resolve is looked at less and less often, but still once in so long.
const LONGEST_BACK_OFF: Duration = Duration::from_secs(10 * 60);

/// What all images of a warmer share.
#[derive(Clone)]
pub(crate) struct Means {
    pub(crate) bus: Bus,
    pub(crate) metrics: Metrics,
    pub(crate) shelf: Shelf,
    pub(crate) budget: Budget,
}

pub(crate) struct Warm {
    reference: ImageReference,
    name: String,
    means: Means,
    interval: Duration,
    keep_younger_than: Duration,
    timeout: Duration,
    /// Looks in a row that found trouble.
    failures: u32,
    /// An image of the list is looked at as often as ever while there is trouble: who listed it waits for it.
    listed: bool,
}

impl Warm {
    pub(crate) fn new(config: &Config, reference: ImageReference, listed: bool, means: &Means) -> Self {
        Self {
            name: reference.to_string(),
            reference,
            means: means.clone(),
            interval: config.interval(),
            keep_younger_than: config.keep_younger_than(),
            timeout: config.timeout(),
            failures: 0,
            listed,
        }
    }

    /// Looks at each interval, for ever. The images that begin together are spread over the interval by their place among
    /// them, and the warmers of an installation by chance.
    pub(crate) async fn keep(mut self, place: u32, count: u32) {
        let turn = self.interval / count.max(1);
        sleep(turn * place + turn.mul_f64(rand::random())).await;
        loop {
            let next = Instant::now() + self.interval;
            let answer = self.look().await;
            self.report(answer);
            sleep_until(next + self.back_off()).await;
        }
    }

    async fn look(&self) -> Result<ResolvedImage, Refusal> {
        let answer = self.ask(false).await?;
        // The answer to a digest doesn't change with its age; and of a stale one the resolver has just tried to get a better.
        if self.reference.digest().is_some() || answer.stale || !self.is_too_old(&answer) {
            return Ok(answer);
        }
        if !self.means.budget.take(self.reference.registry()) {
            self.means.metrics.over_budget.get_or_create(&self.label()).inc();
            return Ok(answer);
        }
        self.means.metrics.refreshed.get_or_create(&self.label()).inc();
        self.ask(true).await
    }

    async fn ask(&self, refresh: bool) -> Result<ResolvedImage, Refusal> {
        let question = ResolveImage { reference: self.name.clone(), refresh, ..ResolveImage::default() };
        self.means.bus.ask(&question, self.timeout).await
    }

    fn report(&mut self, answer: Result<ResolvedImage, Refusal>) {
        let trouble = match &answer {
            Ok(answer) if answer.stale => Some("the registry can't be asked".to_owned()),
            Ok(_) => None,
            Err(refusal) => Some(refusal.to_string()),
        };
        let Means { metrics, shelf, .. } = &self.means;
        if let Ok(answer) = answer {
            shelf.answered(&self.name, answer.reference, Duration::from_millis(answer.age_ms));
        }
        shelf.trouble(&self.name, trouble.as_deref().unwrap_or_default());
        match &trouble {
            // Each trouble once, not at every look.
            Some(trouble) if self.failures == 0 => {
                tracing::warn!("`{}` can't be kept warm: {trouble}", self.name);
            }
            None if self.failures > 0 => tracing::info!("`{}` is kept warm again", self.name),
            _ => {}
        }
        self.failures = if trouble.is_some() { self.failures.saturating_add(1) } else { 0 };
        if trouble.is_some() {
            metrics.failed.get_or_create(&self.label()).inc();
        }
        if let Some(age) = shelf.age(&self.name) {
            metrics.age.get_or_create(&self.label()).set(age.as_secs_f64());
        }
    }

    /// What the next look is later than usual.
    fn back_off(&self) -> Duration {
        match self.failures {
            0 => Duration::ZERO,
            _ if self.listed => Duration::ZERO,
            failures => self.interval.saturating_mul(1 << failures.min(16)).min(LONGEST_BACK_OFF),
        }
    }

    /// Whether it would be too old before the next look.
    fn is_too_old(&self, answer: &ResolvedImage) -> bool {
        Duration::from_millis(answer.age_ms) + self.interval > self.keep_younger_than
    }

    fn label(&self) -> Image {
        Image { reference: self.name.clone() }
    }
}
