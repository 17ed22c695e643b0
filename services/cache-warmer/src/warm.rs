//! One image that is kept warm.

use std::time::Duration;

use kiln_bus::Bus;
use kiln_contract::error::Refusal;
use kiln_contract::resolver::{ResolveImage, ResolvedImage};
use kiln_domain::reference::ImageReference;
use tokio::time::{Instant, MissedTickBehavior, interval_at};

use crate::config::Config;
use crate::metrics::{Image, Metrics};

pub(crate) struct Warm {
    reference: String,
    bus: Bus,
    metrics: Metrics,
    interval: Duration,
    keep_younger_than: Duration,
    timeout: Duration,
    /// When the registry last said what the resolver answers.
    said_at: Option<Instant>,
    failing: bool,
    /// It names a digest, whose answer doesn't change with its age.
    pinned: bool,
}

impl Warm {
    pub(crate) fn new(config: &Config, reference: &str, bus: &Bus, metrics: &Metrics) -> Self {
        Self {
            reference: reference.to_owned(),
            bus: bus.clone(),
            metrics: metrics.clone(),
            interval: config.interval(),
            keep_younger_than: config.keep_younger_than(),
            timeout: config.timeout(),
            said_at: None,
            failing: false,
            pinned: reference.parse::<ImageReference>().is_ok_and(|reference| reference.digest().is_some()),
        }
    }

    /// Looks at each interval, for ever. The images of a list are spread over the interval by their place in it, and the
    /// warmers of an installation by chance.
    pub(crate) async fn keep(mut self, place: u32, count: u32) {
        let turn = self.interval / count.max(1);
        let start = Instant::now() + turn * place + turn.mul_f64(rand::random());
        let mut looks = interval_at(start, self.interval);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            looks.tick().await;
            let answer = self.look().await;
            self.report(answer);
        }
    }

    async fn look(&self) -> Result<ResolvedImage, Refusal> {
        let answer = self.ask(false).await?;
        // Of a stale one the resolver has just tried to get a better.
        if self.pinned || answer.stale || !self.is_too_old(&answer) {
            return Ok(answer);
        }
        self.metrics.refreshed.get_or_create(&self.label()).inc();
        self.ask(true).await
    }

    async fn ask(&self, refresh: bool) -> Result<ResolvedImage, Refusal> {
        let question = ResolveImage { reference: self.reference.clone(), refresh, ..ResolveImage::default() };
        self.bus.ask(&question, self.timeout).await
    }

    fn report(&mut self, answer: Result<ResolvedImage, Refusal>) {
        let reference = &self.reference;
        let trouble = match &answer {
            Ok(answer) if answer.stale => Some("the registry can't be asked".to_owned()),
            Ok(_) => None,
            Err(refusal) => Some(refusal.to_string()),
        };
        if let Ok(answer) = answer {
            self.said_at = Instant::now().checked_sub(Duration::from_millis(answer.age_ms));
        }
        match &trouble {
            // Each trouble once, not at every look.
            Some(trouble) if !self.failing => tracing::warn!("`{reference}` can't be kept warm: {trouble}"),
            None if self.failing => tracing::info!("`{reference}` is kept warm again"),
            _ => {}
        }
        self.failing = trouble.is_some();
        if self.failing {
            self.metrics.failed.get_or_create(&self.label()).inc();
        }
        if let Some(said_at) = self.said_at {
            self.metrics.age.get_or_create(&self.label()).set(said_at.elapsed().as_secs_f64());
        }
    }

    /// Whether it would be too old before the next look.
    fn is_too_old(&self, answer: &ResolvedImage) -> bool {
        Duration::from_millis(answer.age_ms) + self.interval > self.keep_younger_than
    }

    fn label(&self) -> Image {
        Image { reference: self.reference.clone() }
    }
}
