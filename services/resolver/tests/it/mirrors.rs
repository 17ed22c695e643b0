//! Mirrors before registries: who is asked, in which order, and with which credentials.

use std::time::Duration;

use kiln_contract::error::Code;
use kiln_credentials::Installation;
use kiln_domain::reference::Digest;
use kiln_domain::registries::{Reach, Registries};
use kiln_resolver::Config;
use kiln_testkit::front::{Asked, Front, Reply};
use kiln_testkit::registry::DockerRegistry;

use crate::rig::Rig;

const LOGIN: &str = "me:origin's secret";

fn mirrors(registry: &str, mirrors: &[&str]) -> Registries {
    let mirrors = mirrors.iter().map(|mirror| (*mirror).to_owned()).collect();
    [(registry.to_owned(), Reach { mirrors, ..Reach::default() })].into_iter().collect()
}

async fn rig(registries: Registries) -> Rig {
    let config = Config { tag_fresh_seconds: 0, ..Config::default() };
    Rig::with(config, Installation::default(), registries).await
}

/// Before a real registry that has one image, `team/app:1`.
async fn registry() -> (DockerRegistry, Digest) {
    let registry = DockerRegistry::start().await.unwrap();
    let digest = registry.push_image("team/app:1", "linux/amd64", &[("a", b"b")]).await.unwrap();
    (registry, digest)
}

async fn before(registry: &DockerRegistry) -> Front {
    let upstream = registry.address().to_owned();
    Front::start(move |_| Reply::Forward(upstream.clone())).await.unwrap()
}

/// A registry that wants a password, and takes any.
async fn before_with_password(registry: &DockerRegistry) -> Front {
    let upstream = registry.address().to_owned();
    Front::start(move |asked| match asked.authorization() {
        Some(_) => Reply::Forward(upstream.clone()),
        None => Reply::status(401).header("www-authenticate", "Basic realm=\"r\""),
    })
    .await
    .unwrap()
}

fn shown(asked: &[Asked]) -> Vec<&str> {
    asked.iter().filter_map(Asked::authorization).collect()
}

#[tokio::test]
async fn a_mirror_answers_without_the_registry_and_without_its_credentials() {
    let (real, digest) = registry().await;
    let (mirror, origin) = (before(&real).await, before(&real).await);
    let rig = rig(mirrors(&origin.address, &[&mirror.address])).await;
    let image = format!("{}/team/app:1", origin.address);
    let answer = rig.image_as(&image, &origin.address, LOGIN).await.unwrap();
    assert_eq!(answer.reference, format!("{}/team/app@{digest}", origin.address));
    assert_eq!((answer.mirror, answer.cached, answer.stale), (mirror.address.clone(), false, false));
    assert_eq!((origin.asked().len(), shown(&mirror.asked())), (0, vec![]));
    // By its digest it is no other matter.
    let answer = rig.image(&format!("{}/team/app@{digest}", origin.address)).await.unwrap();
    assert_eq!((answer.mirror, origin.asked().len()), (mirror.address.clone(), 0));
    let again = rig.image(&format!("{}/team/app@{digest}", origin.address)).await.unwrap();
    assert_eq!((again.mirror, again.cached), (mirror.address.clone(), true));
    // What lies at a reference of ours is the registry's own word.
    assert_eq!(rig.find(&image).await.unwrap(), digest.to_string());
    assert_eq!(origin.asked().len(), 1);
}

#[tokio::test]
async fn what_a_mirror_lacks_the_next_has_and_at_last_the_registry() {
    let (real, digest) = registry().await;
    let lacks = Front::start(|_| Reply::status(404)).await.unwrap();
    let refuses = Front::start(|_| {
        // It asks for what it must not get.
        Reply::status(401).header("www-authenticate", "Basic realm=\"m\"")
    })
    .await
    .unwrap();
    let breaks =
        Front::start(|_| Reply::json("{}").header("docker-content-digest", "nonsense")).await.unwrap();
    let origin = before_with_password(&real).await;
    let all = [&lacks.address, &refuses.address, &breaks.address].map(String::as_str);
    let rig = rig(mirrors(&origin.address, &all)).await;
    let image = format!("{}/team/app:1", origin.address);
    let answer = rig.image_as(&image, &origin.address, LOGIN).await.unwrap();
    assert_eq!(answer.reference, format!("{}/team/app@{digest}", origin.address));
    assert_eq!((answer.mirror.as_str(), answer.cached), ("", false));
    assert!(shown(&origin.asked()).iter().all(|shown| shown.starts_with("Basic ")));
    for mirror in [&lacks, &refuses, &breaks] {
        assert!(!mirror.asked().is_empty());
        assert_eq!(shown(&mirror.asked()), Vec::<&str>::new());
    }
    // Nobody has it: it is the registry's word that counts.
    let error = rig.image_as(&format!("{}/team/none:1", origin.address), &origin.address, LOGIN).await;
    assert_eq!(error.unwrap_err().code, Code::NotFound);
    let error = rig.image(&image).await.unwrap_err();
    assert_eq!(error.code, Code::Unauthenticated, "{error}");
}

#[tokio::test]
async fn a_mirror_that_limits_or_is_away_or_slow_is_left_alone_and_holds_nobody_up() {
    let (real, digest) = registry().await;
    let limits = Front::start(|_| Reply::status(429).header("retry-after", "100")).await.unwrap();
    let slow = Front::start(|_| Reply::Silence).await.unwrap();
    let origin = before(&real).await;
    let away = {
        let mut registry = DockerRegistry::start().await.unwrap();
        registry.stop();
        registry.address().to_owned()
    };
    let rig = rig(mirrors(&origin.address, &[&limits.address, &away, &slow.address])).await;
    let image = format!("{}/team/app:1", origin.address);
    for _ in 0..3 {
        let answer = rig.image(&image).await.unwrap();
        assert!(answer.reference.ends_with(digest.as_str()) && answer.mirror.is_empty(), "{answer:?}");
    }
    assert_eq!((limits.asked().len(), slow.asked().len()), (1, 1));
    // A mirror's pause is none of the registry's.
    assert!(origin.asked().len() >= 3);
}

#[tokio::test]
async fn an_answer_of_a_mirror_with_a_password_is_for_who_shows_it() {
    let (real, _) = registry().await;
    let mirror = before_with_password(&real).await;
    let origin = Front::start(|_| Reply::status(404)).await.unwrap();
    let config = Config { tag_fresh_seconds: 3600, ..Config::default() };
    let rig = Rig::with(config, Installation::default(), mirrors(&origin.address, &[&mirror.address])).await;
    let image = format!("{}/team/app:1", origin.address);
    let answer = rig.image_as(&image, &mirror.address, LOGIN).await.unwrap();
    assert_eq!((answer.mirror.as_str(), answer.cached), (mirror.address.as_str(), false));
    assert!(rig.image_as(&image, &mirror.address, LOGIN).await.unwrap().cached);
    assert_eq!(rig.image(&image).await.unwrap_err().code, Code::NotFound);
    assert_eq!(shown(&origin.asked()), Vec::<&str>::new());
}

#[tokio::test]
async fn a_known_answer_stays_while_mirror_and_registry_are_away() {
    let (mut real, digest) = registry().await;
    let address = real.address().to_owned();
    let origin = Front::start(|_| Reply::status(500)).await.unwrap();
    let rig = rig(mirrors(&origin.address, &[&address])).await;
    let image = format!("{}/team/app:1", origin.address);
    assert_eq!(rig.image(&image).await.unwrap().mirror, address);
    real.stop();
    let asked = tokio::time::timeout(Duration::from_secs(20), rig.image(&image)).await.unwrap();
    let answer = asked.unwrap();
    assert!(answer.stale && answer.cached && answer.reference.ends_with(digest.as_str()), "{answer:?}");
    assert_eq!(answer.mirror, address, "who said so, then");
}
