//! What a registry is spared: equal questions, questions at once, questions while it wants none, and those for what was
//! not there a moment ago.

use std::time::Duration;

use futures::future::join_all;
use kiln_bus::journal::Journal;
use kiln_contract::error::Code;
use kiln_domain::id::{BuildId, ImageKey, InstanceId};
use kiln_domain::record::Record;
use kiln_domain::reference::Digest;
use kiln_domain::run::Findings;
use kiln_domain::source::Source;
use kiln_domain::transition::Change;
use kiln_resolver::Config;
use kiln_testkit::registry::DockerRegistry;

use crate::front::Front;
use crate::rig::Rig;

async fn replicas(config: Config, more: usize) -> Rig {
    let mut rig = Rig::new(config.clone()).await;
    for _ in 0..more {
        rig.add(config.clone()).await;
    }
    rig
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_equal_questions_over_three_replicas_are_one() {
    let (rig, registry) = (replicas(Config::default(), 2).await, DockerRegistry::start().await.unwrap());
    let front = Front::before(registry.address()).await;
    let digest = registry.push_image("a/b:1", "linux/amd64", &[("a", b"1")]).await.unwrap();
    let name = format!("{}/a/b", front.address);
    let tag = format!("{name}:1");
    let expected = format!("{name}@{digest}");
    for answer in join_all((0..1_000).map(|_| rig.image(&tag))).await {
        assert_eq!(answer.unwrap().reference, expected);
    }
    // HEAD, manifest, and its config for the platform: one replica's, or two's where the second had waited long enough.
    assert!(front.asked().len() <= 6, "{:?}", front.asked());
}

#[tokio::test]
async fn a_pause_that_one_replica_is_asked_for_is_all_replicas() {
    let (rig, registry) = (replicas(Config::default(), 2).await, DockerRegistry::start().await.unwrap());
    let front = Front::before(registry.address()).await;
    front.say(Some((429, Some(120))));
    let refusal = rig.image(&format!("{}/a/b:0", front.address)).await.unwrap_err();
    assert_eq!(refusal.code, Code::Unavailable, "{refusal}");
    let asked = front.asked().len();
    for number in 1..=30 {
        let refusal = rig.image(&format!("{}/a/b:{number}", front.address)).await.unwrap_err();
        assert!(refusal.message.contains(" asked not to be asked for another "), "{refusal}");
    }
    assert_eq!(front.asked().len(), asked, "it was left alone");
}

#[tokio::test]
async fn a_slow_registry_is_asked_so_much_at_once_and_slows_no_other() {
    let config = Config { registry_at_once: 1, ..Config::default() };
    let (rig, registry) = (Rig::new(config).await, DockerRegistry::start().await.unwrap());
    let (slow, quick) = (Front::before(registry.address()).await, Front::before(registry.address()).await);
    registry.push_image("a/b:1", "linux/amd64", &[("a", b"1")]).await.unwrap();
    registry.push_image("a/b:2", "linux/amd64", &[("a", b"2")]).await.unwrap();
    slow.hold_next();
    let (first, second) = (format!("{}/a/b:1", slow.address), format!("{}/a/b:2", slow.address));
    let both = join_all([rig.image(&first), rig.image(&second)]);
    let meanwhile = async {
        slow.holds().await;
        for _ in 0..10 {
            rig.refreshed(&format!("{}/a/b:1", quick.address)).await.unwrap();
        }
        assert_eq!(slow.asked().len(), 1, "{:?}", slow.asked());
        slow.release();
    };
    let (both, ()) = tokio::join!(both, meanwhile);
    assert!(both.iter().all(Result::is_ok), "{both:?}");
}

/// What an orchestrator appends, to the end.
async fn succeed(rig: &Rig, target: &str) {
    let journal = Journal::open(&rig.asking).await.unwrap();
    let by = InstanceId::new("orchestrator", 1).unwrap();
    let id = BuildId::new(&ImageKey::of(target), [0; 10]);
    let source = Source::Image("registry.test/source:1".parse().unwrap());
    let record = Record::accepted(id, target.into(), "registry.test/base:1".into(), source, "ann".into());
    let digest = Digest::of(b"x");
    let mut tail = None;
    for change in [
        Change::Queued(Box::new(record)),
        Change::Claimed { by: by.clone() },
        Change::Started {
            by: by.clone(),
            handle: kiln_domain::engine::Handle::new("h"),
            engine: "fake".into(),
            build_tool: String::new(),
        },
        Change::Succeeded { by: by.clone(), digest, findings: Findings::default() },
    ] {
        tail = Some(journal.append(tail.as_ref(), &change, &by).await.unwrap());
    }
}

#[tokio::test]
async fn what_is_not_there_is_remembered_until_it_is_made_and_never_where_it_decides() {
    let config = Config { not_found_seconds: 60, ..Config::default() };
    let (rig, registry) = (Rig::new(config).await, DockerRegistry::start().await.unwrap());
    let front = Front::before(registry.address()).await;
    let tag = format!("{}/a/b:1", front.address);
    for _ in 0..5 {
        assert_eq!(rig.image(&tag).await.unwrap_err().code, Code::NotFound);
    }
    assert_eq!(front.asked().len(), 1, "{:?}", front.asked());

    let digest = registry.push_image("a/b:1", "linux/amd64", &[("a", b"1")]).await.unwrap();
    assert_eq!(rig.image(&tag).await.unwrap_err().code, Code::NotFound, "as remembered");
    assert_eq!(rig.find(&tag).await.unwrap(), digest.to_string(), "that decides");
    succeed(&rig, &tag).await;
    let known = async {
        while rig.image(&tag).await.is_err() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), known).await.expect("the news came");

    let other = format!("{}/a/b:2", front.address);
    assert_eq!(rig.image(&other).await.unwrap_err().code, Code::NotFound);
    registry.push_image("a/b:2", "linux/amd64", &[("a", b"2")]).await.unwrap();
    assert!(rig.refreshed(&other).await.is_ok(), "a refresh asks");
    assert!(rig.image(&other).await.is_ok());
}
