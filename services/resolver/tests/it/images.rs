//! References to digests.

use futures::future::join_all;
use kiln_contract::error::Code;
use kiln_contract::resolver::ResolveImage;
use kiln_resolver::Config;
use kiln_testkit::registry::{DockerRegistry, Files, PASSWORD, USERNAME};

use crate::front::Front;
use crate::rig::Rig;

#[tokio::test]
async fn a_tag_is_the_digest_of_its_platforms_manifest() {
    let (rig, registry) = (Rig::new(Config::default()).await, DockerRegistry::start().await.unwrap());
    let images: [(&str, Files<'_>); 2] = [("linux/amd64", &[("a", b"1")]), ("linux/arm64", &[("a", b"2")])];
    let (index, digests) = registry.push_index("some/app:1", &images).await.unwrap();
    let name = format!("{}/some/app", registry.address());
    for (reference, platform, digest) in [
        (format!("{name}:1"), "", &digests[0]),
        (format!("{name}:1"), "linux/arm64", &digests[1]),
        (format!("{name}@{index}"), "linux/amd64", &digests[0]),
        (format!("{name}:1@{index}"), "linux/arm64", &digests[1]),
        (format!("{name}@{}", digests[1]), "linux/arm64", &digests[1]),
    ] {
        let question =
            ResolveImage { reference: reference.clone(), platform: platform.into(), ..Default::default() };
        let resolved = rig.ask(&question).await.unwrap();
        assert_eq!(resolved.reference, format!("{name}@{digest}"), "{reference} {platform}");
        assert!(!resolved.stale);
    }
    assert_eq!(rig.find(&format!("{name}:1")).await.unwrap(), index.to_string());
    assert_eq!(rig.find(&format!("{name}:2")).await.unwrap(), "");
}

#[tokio::test]
async fn what_cannot_be_resolved_says_why() {
    let (rig, registry) = (Rig::new(Config::default()).await, DockerRegistry::start().await.unwrap());
    registry.push_image("a/b:1", "linux/amd64", &[("a", b"1")]).await.unwrap();
    registry.push_index("a/index:1", &[("linux/amd64", &[])]).await.unwrap();
    let at = registry.address();
    let digest = "0".repeat(64);
    let long = "x".repeat(2_000);
    for (reference, platform, code, beginning) in [
        (format!("{at}/a/b:2"), "", Code::NotFound, "cannot resolve image: "),
        (format!("{at}/no/such:1"), "", Code::NotFound, "cannot resolve image: "),
        (format!("{at}/a/b@sha256:{digest}"), "", Code::NotFound, "cannot resolve image: "),
        (
            format!("{at}/a/index:1"),
            "linux/s390x",
            Code::NotFound,
            "cannot resolve image: no manifest for platform linux-s390x found",
        ),
        (
            "no-such-host.invalid/a/b:1".into(),
            "",
            Code::NotFound,
            "cannot resolve image: registry host no-such-host",
        ),
        (format!("{at}/a/b:1"), "Linux", Code::InvalidArgument, "platform: `Linux`"),
        ("UPPER/x".into(), "", Code::InvalidArgument, "cannot parse image ref `UPPER/x`"),
        ("a//b".into(), "", Code::InvalidArgument, "cannot parse image ref"),
        ("x:tag:tag".into(), "", Code::InvalidArgument, "cannot parse image ref"),
        ("https://x/y".into(), "", Code::InvalidArgument, "cannot parse image ref"),
        (String::new(), "", Code::InvalidArgument, "cannot parse image ref"),
        (digest, "", Code::InvalidArgument, "cannot parse image ref"),
        (long, "", Code::InvalidArgument, "cannot parse image ref"),
    ] {
        let question =
            ResolveImage { reference: reference.clone(), platform: platform.into(), ..Default::default() };
        let refusal = rig.ask(&question).await.unwrap_err();
        assert_eq!(refusal.code, code, "{reference}: {refusal}");
        assert!(refusal.message.starts_with(beginning), "{reference}: {refusal}");
    }
    assert_eq!(rig.find("a//b").await.unwrap_err().code, Code::InvalidArgument);
}

#[tokio::test]
async fn a_fresh_answer_needs_no_question_and_an_unchanged_tag_one() {
    let (mut rig, registry) = (Rig::new(Config::default()).await, DockerRegistry::start().await.unwrap());
    let front = Front::before(registry.address()).await;
    let first = registry.push_image("a/b:1", "linux/amd64", &[("a", b"1")]).await.unwrap();
    let name = format!("{}/a/b", front.address);
    let tag = format!("{name}:1");

    assert_eq!(rig.image(&tag).await.unwrap().reference, format!("{name}@{first}"));
    let asked = front.asked();
    assert_eq!(asked[0], "HEAD /v2/a/b/manifests/1");
    rig.image(&tag).await.unwrap();
    rig.replace(Config::default()).await;
    rig.image(&tag).await.unwrap();
    assert_eq!(front.asked(), asked, "another resolver knows it too");

    let resolved = rig.refreshed(&tag).await.unwrap();
    assert_eq!(resolved.reference, format!("{name}@{first}"));
    assert_eq!(front.asked()[asked.len()..], ["HEAD /v2/a/b/manifests/1"], "refreshed by one HEAD");

    let second = registry.push_image("a/b:1", "linux/amd64", &[("a", b"2")]).await.unwrap();
    assert_eq!(rig.image(&tag).await.unwrap().reference, format!("{name}@{first}"), "still fresh");
    assert_eq!(rig.refreshed(&tag).await.unwrap().reference, format!("{name}@{second}"));
    assert_eq!(rig.image(&tag).await.unwrap().reference, format!("{name}@{second}"));
}

#[tokio::test]
async fn a_digest_is_for_ever_and_a_tag_that_isnt_fresh_is_asked_again() {
    let config = Config { tag_fresh_seconds: 0, ..Config::default() };
    let (rig, registry) = (Rig::new(config).await, DockerRegistry::start().await.unwrap());
    let front = Front::before(registry.address()).await;
    let first = registry.push_image("a/b:1", "linux/amd64", &[("a", b"1")]).await.unwrap();
    let name = format!("{}/a/b", front.address);
    rig.image(&format!("{name}@{first}")).await.unwrap();
    let asked = front.asked().len();
    rig.image(&format!("{name}@{first}")).await.unwrap();
    assert_eq!(front.asked().len(), asked);

    let tag = format!("{name}:1");
    rig.image(&tag).await.unwrap();
    let second = registry.push_image("a/b:1", "linux/amd64", &[("a", b"2")]).await.unwrap();
    assert_eq!(rig.image(&tag).await.unwrap().reference, format!("{name}@{second}"));
}

#[tokio::test]
async fn equal_questions_are_one() {
    let (rig, registry) = (Rig::new(Config::default()).await, DockerRegistry::start().await.unwrap());
    let front = Front::before(registry.address()).await;
    registry.push_image("a/b:1", "linux/amd64", &[("a", b"1")]).await.unwrap();
    let tag = format!("{}/a/b:1", front.address);
    let answers = join_all((0..200).map(|_| rig.image(&tag))).await;
    let first = answers[0].clone().unwrap().reference;
    assert!(answers.into_iter().all(|answer| answer.unwrap().reference == first));
    // HEAD, manifest, and its config for the platform.
    assert!(front.asked().len() <= 3, "{:?}", front.asked());
}

#[tokio::test]
async fn a_refresh_joins_no_older_question_and_its_answer_stays() {
    let (rig, registry) = (Rig::new(Config::default()).await, DockerRegistry::start().await.unwrap());
    let front = Front::before(registry.address()).await;
    registry.push_image("a/b:1", "linux/amd64", &[("a", b"1")]).await.unwrap();
    let name = format!("{}/a/b", front.address);
    let tag = format!("{name}:1");
    front.hold_next();
    let newer = async {
        front.holds().await;
        let second = registry.push_image("a/b:1", "linux/amd64", &[("a", b"2")]).await.unwrap();
        let refreshed = rig.refreshed(&tag).await.unwrap();
        front.release();
        assert_eq!(refreshed.reference, format!("{name}@{second}"));
        refreshed
    };
    let (older, newer) = tokio::join!(rig.image(&tag), newer);
    assert_eq!(older.unwrap().reference, newer.reference, "the newer answer was known when it came");
    assert_eq!(rig.image(&tag).await.unwrap().reference, newer.reference);
}

#[tokio::test]
async fn who_shows_no_credentials_gets_no_answer_that_was_made_with_them() {
    let rig = Rig::new(Config::default()).await;
    let mut registry = DockerRegistry::start_with_password().await.unwrap();
    let digest = registry.push_image("a/b:1", "linux/amd64", &[("a", b"1")]).await.unwrap();
    let (at, tag) = (registry.address().to_owned(), format!("{}/a/b:1", registry.address()));
    let right = format!("{USERNAME}:{PASSWORD}");
    let wrong = format!("{USERNAME}:wrong-word");

    let resolved = rig.image_as(&tag, &at, &right).await.unwrap();
    assert_eq!(resolved.reference, format!("{at}/a/b@{digest}"));
    let refusal = rig.image(&tag).await.unwrap_err();
    assert_eq!(refusal.code, Code::Unauthenticated, "{refusal}");
    assert!(refusal.message.starts_with("cannot resolve image"), "{refusal}");
    let refusal = rig.image_as(&tag, &at, &wrong).await.unwrap_err();
    assert_eq!(refusal.code, Code::Unauthenticated, "{refusal}");
    assert!(!refusal.message.contains("wrong-word"), "{refusal}");
    let refusal = rig.image_as(&tag, &at, "no-colon-s3cret").await.unwrap_err();
    assert_eq!(refusal.code, Code::InvalidArgument, "{refusal}");
    assert!(
        refusal.message.starts_with("auth.credentials") && !refusal.message.contains("s3cret"),
        "{refusal}"
    );

    registry.stop();
    assert_eq!(rig.image_as(&tag, &at, &right).await.unwrap().reference, resolved.reference);
    assert_eq!(rig.image(&tag).await.unwrap_err().code, Code::Unavailable);
}
