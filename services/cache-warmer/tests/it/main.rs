//! The cache-warmer on a real bus, before a resolver whose cache the test holds.

#![cfg(test)]

mod layers;
mod store;

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kiln_bus::journal::Journal;
use kiln_bus::layout::Layout;
use kiln_bus::serve::Server;
use kiln_bus::{Bus, Connect};
use kiln_cache_warmer::{Config, LayerCaches, Parts, Store, run};
use kiln_contract::cache_warmer::{ListWarm, WarmImage};
use kiln_contract::error::{Code, Refusal};
use kiln_contract::resolver::{ResolveImage, ResolvedImage};
use kiln_domain::failure::{Failure, FailureReason};
use kiln_domain::id::InstanceId;
use kiln_domain::run::{Base, Findings};
use kiln_domain::transition::Change;
use kiln_testkit::nats::{NatsServer, run_server};
use kiln_testkit::records;
use prometheus_client::registry::Registry;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

const SOON: Duration = Duration::from_secs(20);
const PINNED: &str = "r.io/x@sha256:0123456789012345678901234567890123456789012345678901234567890123";

/// What a resolver was asked, and when each image was last refreshed.
#[derive(Default)]
struct Resolver {
    refreshed_at: Mutex<HashMap<String, Instant>>,
    asked: watch::Sender<HashMap<String, Asked>>,
}

#[derive(Clone, Copy, Default)]
struct Asked {
    looks: u32,
    refreshes: u32,
    /// The greatest age that a look has found.
    oldest: Duration,
}

impl Resolver {
    /// Starts it: `r.io/missing` it doesn't know, a digest's answer is an hour old.
    async fn start(bus: &Bus) -> (Arc<Self>, Server) {
        let resolver = Arc::new(Self::default());
        let server = Server::start(bus, "resolver", &mut Registry::default()).await.unwrap();
        let shared = resolver.clone();
        server
            .answer(move |question: ResolveImage| std::future::ready(shared.answer(question)))
            .await
            .unwrap();
        (resolver, server)
    }

    fn answer(&self, question: ResolveImage) -> Result<ResolvedImage, Refusal> {
        let ResolveImage { reference, refresh, .. } = question;
        let now = Instant::now();
        let mut refreshed_at = self.refreshed_at.lock().unwrap();
        let said_at = *refreshed_at
            .entry(reference.clone())
            .and_modify(|at| {
                if refresh {
                    *at = now
                }
            })
            .or_insert(now);
        let age = if reference == PINNED { Duration::from_secs(3600) } else { said_at.elapsed() };
        self.asked.send_modify(|asked| {
            let asked = asked.entry(reference.clone()).or_default();
            asked.refreshes += u32::from(refresh);
            asked.looks += u32::from(!refresh);
            asked.oldest = asked.oldest.max(age);
        });
        if reference.starts_with("r.io/missing") {
            return Err(Refusal::new(Code::NotFound, "cannot resolve image: there is none"));
        }
        Ok(ResolvedImage { reference, age_ms: age.as_millis() as u64, ..Default::default() })
    }

    /// Waits until it was asked so, and returns how.
    async fn once(&self, reference: &str, enough: impl Fn(&Asked) -> bool) -> Asked {
        let mut asked = self.asked.subscribe();
        let enough = asked.wait_for(|asked| asked.get(reference).is_some_and(&enough));
        timeout(SOON, enough).await.expect("in time").unwrap()[reference]
    }
}

async fn bus() -> (NatsServer, Bus) {
    let nats = run_server().await.unwrap();
    let connect = Connect { url: nats.url(), user: None, password: None, name: "test".into() };
    let bus = connect.connect().await.unwrap();
    let small = Layout { journal_max_bytes: 1 << 20, logs_max_bytes: 1 << 20, ..Layout::default() };
    bus.provision(&small).await.unwrap();
    (nats, bus)
}

fn config(refs: &[&str]) -> Config {
    let refs = refs.iter().map(|text| (*text).to_owned()).collect();
    Config { refs, interval_seconds: 1, keep_younger_than_seconds: 2, ..Config::default() }
}

/// Some warmers that run until they are stopped.
#[derive(Default)]
struct Warmers {
    running: JoinSet<()>,
    stop: CancellationToken,
}

impl Warmers {
    /// Starts one; returns what it counts.
    async fn start(&mut self, bus: &Bus, config: Config) -> Registry {
        self.start_with(bus, config, None, None).await
    }

    /// The same, where builds have a store.
    async fn start_with(
        &mut self,
        bus: &Bus,
        config: Config,
        store: Option<Arc<dyn Store>>,
        layers: Option<Arc<dyn LayerCaches>>,
    ) -> Registry {
        let parts = Parts { bus: bus.clone(), metrics: Registry::default(), store, layers };
        let (stop, (ready, counted)) = (self.stop.clone(), oneshot::channel());
        self.running.spawn(async move {
            run(config, parts, |metrics| drop(ready.send(metrics)), stop).await.unwrap();
        });
        counted.await.unwrap()
    }

    async fn stop(mut self) {
        self.stop.cancel();
        let ended = async { while self.running.join_next().await.is_some() {} };
        timeout(SOON, ended).await.expect("they stop");
    }
}

fn text_of(metrics: &Registry) -> String {
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, metrics).unwrap();
    text
}

#[tokio::test]
async fn answers_are_refreshed_before_they_are_too_old_by_any_number_of_warmers() {
    let (_nats, bus) = bus().await;
    let (resolver, server) = Resolver::start(&bus).await;
    let mut warmers = Warmers::default();
    let config = config(&["r.io/a:1", PINNED, "r.io/missing:1"]);
    let metrics = warmers.start(&bus, config.clone()).await;
    warmers.start(&bus, config).await;

    let asked = resolver.once("r.io/a:1", |asked| asked.refreshes >= 3).await;
    // The limit, and what a busy machine adds.
    assert!(asked.oldest < Duration::from_millis(2_500), "{:?}", asked.oldest);
    let asked = resolver.once(PINNED, |asked| asked.looks >= 3).await;
    assert_eq!(asked.refreshes, 0, "a digest's answer doesn't change");
    resolver.once("r.io/missing:1", |asked| asked.looks >= 5).await;

    warmers.stop().await;
    server.drain().await;
    let text = text_of(&metrics);
    for line in
        ["refs_age_seconds{reference=\"r.io/a:1\"} ", "refs_failed_total{reference=\"r.io/missing:1\"} "]
    {
        assert!(text.contains(line), "{text}");
    }
    assert!(!text.contains("refs_failed_total{reference=\"r.io/a:1\"}"), "{text}");
}

#[tokio::test]
async fn a_resolver_that_comes_later_is_asked_then() {
    let (_nats, bus) = bus().await;
    let mut warmers = Warmers::default();
    let metrics = warmers.start(&bus, config(&["r.io/a:1"])).await;
    let failed = async {
        while !text_of(&metrics).contains("refs_failed_total{reference=\"r.io/a:1\"}") {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(SOON, failed).await.expect("a failure is counted");
    let (resolver, _server) = Resolver::start(&bus).await;
    resolver.once("r.io/a:1", |asked| asked.looks >= 1).await;
    warmers.stop().await;
}

#[tokio::test]
async fn a_wrong_ref_is_named_by_its_key() {
    let (_nats, bus) = bus().await;
    let parts = Parts { bus, metrics: Registry::default(), store: None, layers: None };
    let error = run(config(&["r.io/a:1", "a//b"]), parts, drop, CancellationToken::new()).await.unwrap_err();
    let error = error.to_string();
    assert!(error.contains("refs[1]: cannot parse image ref `a//b`"), "{error}");
}

/// A finished build that used these images, in the journal.
async fn finished_build(bus: &Bus, image: &str, bases: &[&str]) {
    let journal = Journal::open(bus).await.unwrap();
    let me = InstanceId::new("test", 1).unwrap();
    let queued = records::queued(image, [1; 10]).unwrap();
    let mut tail = journal.append(None, &Change::Queued(Box::new(queued)), &me).await.unwrap();
    let bases = bases.iter().map(|base| Base { reference: (*base).into(), digest: None }).collect();
    let findings = Findings { bases, ..Findings::default() };
    let failure = Failure::new(FailureReason::Dockerfile, "a step failed");
    for change in
        [Change::Claimed { by: me.clone() }, Change::Failed { by: Some(me.clone()), failure, findings }]
    {
        tail = journal.append(Some(&tail), &change, &me).await.unwrap();
    }
}

#[tokio::test]
async fn what_builds_used_is_kept_warm_and_listed() {
    let (_nats, bus) = bus().await;
    let (resolver, _server) = Resolver::start(&bus).await;
    finished_build(&bus, "one", &["r.io/base:1", "r.io/rare:1"]).await;
    finished_build(&bus, "two", &["r.io/base:1"]).await;
    let mut warmers = Warmers::default();
    let config = Config { used_images: 2, used_interval_seconds: 1, ..config(&["r.io/a:1"]) };
    let metrics = warmers.start(&bus, config).await;
    resolver.once("r.io/base:1", |asked| asked.refreshes >= 1).await;

    let list = async || bus.ask(&ListWarm {}, SOON).await.unwrap().images;
    let warm = |image: &WarmImage| !image.resolved.is_empty();
    // `registry.test/source:1` is what both builds were copies of, by their records.
    let of_builds = ["r.io/base:1", "registry.test/source:1"];
    let listed = timeout(SOON, async {
        loop {
            let images = list().await;
            if images.len() == 3 && images.iter().all(warm) {
                return images;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    let images = listed.await.expect("all are warm");
    let names: Vec<_> = images.iter().map(|image| image.reference.as_str()).collect();
    assert_eq!(names, ["r.io/a:1", of_builds[0], of_builds[1]], "the rarest has no place");
    let uses: Vec<_> = images.iter().map(|image| (image.configured, image.builds)).collect();
    assert_eq!(uses, [(true, 0), (false, 2), (false, 2)]);

    // Of what is used more from now on there is a place, and what has lost it is forgotten, its figures too.
    for image in ["three", "four", "five"] {
        finished_build(&bus, image, &["r.io/new:1"]).await;
    }
    resolver.once("r.io/new:1", |asked| asked.looks >= 1).await;
    let gone = async {
        while text_of(&metrics).contains("reference=\"r.io/base:1\"") {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(SOON, gone).await.expect("its figures go");
    warmers.stop().await;
}

#[tokio::test]
async fn a_registry_is_not_asked_beyond_its_budget() {
    let (_nats, bus) = bus().await;
    let (resolver, _server) = Resolver::start(&bus).await;
    let mut warmers = Warmers::default();
    let config = Config { refreshes_per_minute: 1, ..config(&["r.io/a:1", "r.io/b:1", "other.io/c:1"]) };
    let metrics = warmers.start(&bus, config).await;
    let over = async {
        while !text_of(&metrics).contains("refs_over_budget_total{reference=\"r.io/") {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(SOON, over).await.expect("the budget is used up");
    resolver.once("other.io/c:1", |asked| asked.refreshes == 1).await;
    warmers.stop().await;
    let asked = resolver.asked.borrow();
    assert_eq!(asked["r.io/a:1"].refreshes + asked["r.io/b:1"].refreshes, 1);
}
