//! The store of this host's builds, played by the test.

use std::sync::Mutex;

use async_trait::async_trait;
use kiln_cache_warmer::StoreError;
use kiln_domain::reference::ImageReference;

use super::*;

/// Each image has 100 bytes, but for `r.io/large` with 1,000; `r.io/private` can't be pulled.
#[derive(Default)]
struct Played {
    /// What was done, in order.
    done: watch::Sender<Vec<String>>,
    pulling: Mutex<()>,
}

impl Played {
    async fn until(&self, wanted: impl Fn(&[String]) -> bool) -> Vec<String> {
        let mut done = self.done.subscribe();
        timeout(SOON, done.wait_for(|done| wanted(done))).await.expect("in time").unwrap().clone()
    }

    fn note(&self, verb: &str, image: &ImageReference) {
        self.done.send_modify(|done| done.push(format!("{verb} {}", image.repository())));
    }
}

#[async_trait]
impl Store for Played {
    async fn bytes(&self, image: &ImageReference) -> Result<u64, StoreError> {
        Ok(if image.repository() == "large" { 1_000 } else { 100 })
    }

    async fn pull(&self, image: &ImageReference) -> Result<(), StoreError> {
        let _one_at_a_time = self.pulling.try_lock().expect("one after another");
        self.note("pull", image);
        if image.repository() == "private" { Err(StoreError("unauthorized".into())) } else { Ok(()) }
    }

    async fn remove(&self, image: &ImageReference) -> Result<(), StoreError> {
        self.note("remove", image);
        Ok(())
    }
}

#[tokio::test]
async fn what_is_kept_warm_is_pulled_once_and_no_more_than_there_is_room_for() {
    let (_nats, bus) = bus().await;
    let (resolver, _server) = Resolver::start(&bus).await;
    let store = Arc::new(Played::default());
    let mut warmers = Warmers::default();
    let refs = ["r.io/large:1", "r.io/private:1", "r.io/a:1", "r.io/b:1", "r.io/c:1", "r.io/d:1"];
    let config = Config { pull_bytes: 399, ..config(&refs) };
    let metrics = warmers.start_with(&bus, config, Some(store.clone()), None).await;
    let pulled = |done: &[String], name: &str| done.iter().filter(|done| *done == name).count();
    let of_four = |done: &[String]| ["pull a", "pull b", "pull c", "pull d"].map(|name| pulled(done, name));
    store.until(|done| of_four(done).iter().sum::<usize>() == 3 && pulled(done, "pull private") == 1).await;
    // Further looks, with the same images: nothing is pulled again, or tried again so soon.
    let looks = resolver.once("r.io/d:1", |_| true).await.looks;
    resolver.once("r.io/d:1", |asked| asked.looks >= looks + 3).await;
    warmers.stop().await;
    let done = store.done.borrow().clone();
    assert_eq!(done.len(), 4, "{done:?}");
    assert_eq!(pulled(&done, "pull large"), 0, "{done:?}");
    let text = text_of(&metrics);
    for line in ["refs_pulled_total 3\n", "refs_stored_bytes 300\n"] {
        assert!(text.contains(line), "{line} is not in {text}");
    }
}

#[tokio::test]
async fn what_builds_no_longer_use_is_given_up() {
    let (_nats, bus) = bus().await;
    let (_resolver, _server) = Resolver::start(&bus).await;
    finished_build(&bus, "one", &["r.io/old:1"]).await;
    let store = Arc::new(Played::default());
    let mut warmers = Warmers::default();
    let config = Config { used_images: 2, used_interval_seconds: 1, pull_bytes: 1_000, ..config(&[]) };
    warmers.start_with(&bus, config, Some(store.clone()), None).await;
    let has = |done: &[String], name: &str| done.iter().any(|done| done == name);
    store.until(|done| has(done, "pull old")).await;
    for image in ["two", "three", "four"] {
        finished_build(&bus, image, &["r.io/new:1"]).await;
    }
    store.until(|done| has(done, "pull new") && has(done, "remove old")).await;
    warmers.stop().await;
}
