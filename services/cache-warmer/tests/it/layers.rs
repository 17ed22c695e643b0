//! The registry in which builds leave their layers, played by the test.

use async_trait::async_trait;
use kiln_cache_warmer::{CachedLayers, LayerCaches, StoreError};
use kiln_domain::reference::Digest;

use super::*;

struct Played {
    there: watch::Sender<Vec<CachedLayers>>,
}

#[async_trait]
impl LayerCaches for Played {
    async fn list(&self) -> Result<Vec<CachedLayers>, StoreError> {
        Ok(self.there.borrow().clone())
    }

    async fn remove(&self, digest: &Digest) -> Result<(), StoreError> {
        self.there.send_modify(|there| there.retain(|cache| cache.digest != *digest));
        Ok(())
    }
}

#[tokio::test]
async fn layers_are_kept_within_their_bounds() {
    let (_nats, bus) = bus().await;
    let cache = |name: &str, written: Option<&str>| CachedLayers {
        digest: Digest::of(name.as_bytes()),
        bytes: 100,
        written: written.map(|written| written.parse().unwrap()),
    };
    // Two tags of one manifest, one that is long out of use, and one that nobody goes on writing.
    let there = vec![
        cache("kept", Some("2100-01-01T00:00:00Z")),
        cache("kept", Some("2100-01-01T00:00:00Z")),
        cache("old", Some("2020-01-01T00:00:00Z")),
        cache("left half", None),
    ];
    let played = Arc::new(Played { there: watch::Sender::new(there) });
    let config = Config { layers_sweep_seconds: 1, layers_max_bytes: 200, ..config(&[]) };
    let mut warmers = Warmers::default();
    let metrics = warmers.start_with(&bus, config, None, Some(played.clone())).await;
    let mut seen = played.there.subscribe();
    let swept = seen.wait_for(|there| there.len() == 2);
    let swept = timeout(SOON, swept).await.expect("in time").unwrap().clone();
    assert!(swept.iter().all(|cache| cache.digest == Digest::of(b"kept")));
    warmers.stop().await;
    let text = text_of(&metrics);
    assert!(text.contains("layers_bytes 100") && text.contains("layers_removed_total 2"), "{text}");
}
