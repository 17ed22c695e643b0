//! What resolvers said a moment ago: given again to who asks the same meanwhile, so that a thousand starts of one image
//! cost the bus one question a second, not a thousand.
//!
//! Only for questions that bear no credentials and don't want the registry's own word, and never longer than the resolver
//! itself would give the answer without asking anew.

use std::time::Duration;

use kiln_contract::resolver::ResolvedImage;
use moka::future::Cache;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::registry::Registry;
use tokio::time::Instant;

const MOST: u64 = 10_000;
const KEPT_FOR: Duration = Duration::from_secs(1);

pub(crate) struct Resolved {
    kept: Cache<Asked, Kept>,
    given: Counter,
}

/// A reference in its normal form, and a platform.
pub(crate) type Asked = (String, String);

#[derive(Clone)]
struct Kept {
    answer: ResolvedImage,
    at: Instant,
}

impl Resolved {
    pub(crate) fn register(registry: &mut Registry) -> Self {
        let given = Counter::default();
        let help = "References resolved by what a resolver had said within the last second";
        registry.register("resolved_again", help, given.clone());
        Self { kept: Cache::builder().max_capacity(MOST).time_to_live(KEPT_FOR).build(), given }
    }

    /// What was said to the same question, as old as it is by now.
    pub(crate) async fn get(&self, asked: &Asked) -> Option<ResolvedImage> {
        let Kept { answer, at } = self.kept.get(asked).await?;
        let since = u64::try_from(at.elapsed().as_millis()).unwrap_or(u64::MAX);
        if since >= answer.fresh_for_ms {
            return None;
        }
        self.given.inc();
        let age_ms = answer.age_ms.saturating_add(since);
        Some(ResolvedImage { age_ms, cached: true, ..answer })
    }

    /// Keeps an answer in place of what was kept of its question.
    pub(crate) async fn keep(&self, asked: Asked, answer: &ResolvedImage) {
        self.kept.insert(asked, Kept { answer: answer.clone(), at: Instant::now() }).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(reference: &str) -> Asked {
        (reference.to_owned(), "linux/amd64".to_owned())
    }

    #[tokio::test(start_paused = true)]
    async fn as_long_as_the_resolver_would_and_as_old_as_it_is() {
        let resolved = Resolved::register(&mut Registry::default());
        let said = ResolvedImage { age_ms: 10, fresh_for_ms: 300, ..Default::default() };
        resolved.keep(asked("a"), &said).await;
        resolved.keep(asked("stale"), &ResolvedImage { fresh_for_ms: 0, stale: true, ..said.clone() }).await;
        tokio::time::advance(Duration::from_millis(200)).await;
        let again = resolved.get(&asked("a")).await.unwrap();
        assert_eq!((again.age_ms, again.cached), (210, true));
        assert_eq!(resolved.get(&asked("stale")).await, None);
        assert_eq!(resolved.get(&("a".to_owned(), "linux/arm64".to_owned())).await, None);
        resolved.keep(asked("a"), &ResolvedImage { age_ms: 0, ..said }).await;
        assert_eq!(resolved.get(&asked("a")).await.unwrap().age_ms, 0);
        tokio::time::advance(Duration::from_millis(300)).await;
        assert_eq!(resolved.get(&asked("a")).await, None);
        assert_eq!(resolved.given.get(), 2);
    }
}
