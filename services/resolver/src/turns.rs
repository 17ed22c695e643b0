//! How many questions a registry is asked at once. Each registry has places of its own: one that is slow holds up nobody
//! who asks another.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Registries that nobody asks at the moment are forgotten when there are more than these.
const MOST: usize = 1_000;

pub(crate) struct Turns {
    at_once: usize,
    by_registry: Mutex<HashMap<String, Arc<Semaphore>>>,
}

impl Turns {
    pub(crate) fn new(at_once: usize) -> Self {
        Self { at_once, by_registry: Mutex::default() }
    }

    /// Waits for a place at a registry; it is given back on drop. `None` never comes: no semaphore is closed.
    pub(crate) async fn take(&self, registry: &str) -> Option<OwnedSemaphorePermit> {
        self.places(registry).acquire_owned().await.ok()
    }

    fn places(&self, registry: &str) -> Arc<Semaphore> {
        let mut registries = self.by_registry.lock().unwrap_or_else(PoisonError::into_inner);
        if registries.len() > MOST {
            // Whoever holds a place, or waits for one, holds the semaphore, too.
            registries.retain(|_, places| Arc::strong_count(places) > 1);
        }
        let places = registries.entry(registry.to_owned());
        places.or_insert_with(|| Arc::new(Semaphore::new(self.at_once))).clone()
    }
}

#[cfg(test)]
mod tests {
    use futures::poll;

    use super::*;

    #[tokio::test]
    async fn a_full_registry_holds_up_only_its_own() {
        let turns = Turns::new(2);
        let (first, _second) = (turns.take("slow.test").await, turns.take("slow.test").await);
        let mut third = Box::pin(turns.take("slow.test"));
        assert!(poll!(&mut third).is_pending());
        assert!(turns.take("other.test").await.is_some());
        drop(first);
        assert!(third.await.is_some());
    }

    #[tokio::test]
    async fn those_that_nobody_asks_are_forgotten() {
        let turns = Turns::new(1);
        let held = turns.take("held.test").await;
        for number in 0..2 * MOST {
            turns.take(&format!("{number}.test")).await;
        }
        assert!(turns.by_registry.lock().unwrap().len() <= MOST + 1);
        let mut again = Box::pin(turns.take("held.test"));
        assert!(poll!(&mut again).is_pending());
        drop(held);
    }
}
