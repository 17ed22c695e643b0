//! How often each registry may be asked for a refresh: no list, however long, becomes a storm of requests.

use std::num::NonZeroU32;
use std::sync::Arc;

use governor::{DefaultKeyedRateLimiter, Quota};

/// Clones share it.
#[derive(Clone)]
pub(crate) struct Budget {
    by_registry: Arc<DefaultKeyedRateLimiter<String>>,
}

impl Budget {
    pub(crate) fn new(refreshes_per_minute: u32) -> Self {
        let quota = Quota::per_minute(NonZeroU32::new(refreshes_per_minute).unwrap_or(NonZeroU32::MIN));
        Self { by_registry: Arc::new(DefaultKeyedRateLimiter::hashmap(quota)) }
    }

    /// Takes one request of this registry's budget, if one is left.
    pub(crate) fn take(&self, registry: &str) -> bool {
        self.by_registry.check_key(&registry.to_owned()).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_registry_has_its_own() {
        let budget = Budget::new(2);
        let taken: Vec<_> = ["a", "a", "a", "b"].map(|registry| budget.take(registry)).into();
        assert_eq!(taken, [true, true, false, true]);
    }
}
