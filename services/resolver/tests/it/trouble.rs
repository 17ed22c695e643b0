//! Registries that can't be asked, or don't want to be.

use kiln_contract::error::Code;
use kiln_resolver::Config;
use kiln_testkit::registry::DockerRegistry;

use crate::front::Front;
use crate::rig::Rig;

/// Every tag is asked again each time.
fn impatient() -> Config {
    Config { tag_fresh_seconds: 0, not_found_seconds: 0, ..Config::default() }
}

#[tokio::test]
async fn an_older_answer_is_given_marked_while_the_registry_is_away() {
    let (mut rig, mut registry) = (Rig::new(impatient()).await, DockerRegistry::start().await.unwrap());
    registry.push_image("a/b:1", "linux/amd64", &[("a", b"1")]).await.unwrap();
    let at = registry.address().to_owned();
    let known = rig.image(&format!("{at}/a/b:1")).await.unwrap();
    assert!(!known.stale);

    registry.stop();
    let stale = rig.image(&format!("{at}/a/b:1")).await.unwrap();
    assert_eq!((stale.reference.as_str(), stale.stale), (known.reference.as_str(), true));
    assert!(rig.refreshed(&format!("{at}/a/b:1")).await.unwrap().stale);
    let refusal = rig.image(&format!("{at}/a/b:2")).await.unwrap_err();
    assert_eq!(refusal.code, Code::Unavailable, "{refusal}");
    assert!(refusal.message.starts_with(&format!("cannot resolve image: registry {at}")), "{refusal}");
    assert_eq!(
        rig.find(&format!("{at}/a/b:1")).await.unwrap_err().code,
        Code::Unavailable,
        "never from a cache"
    );

    rig.replace(impatient()).await;
    assert!(
        rig.image(&format!("{at}/a/b:1")).await.unwrap().stale,
        "another resolver has it from the bucket"
    );
    rig.replace(Config { serve_stale_seconds: 0, ..impatient() }).await;
    assert_eq!(rig.image(&format!("{at}/a/b:1")).await.unwrap_err().code, Code::Unavailable, "too old");
    rig.forget_key();
    rig.replace(impatient()).await;
    assert_eq!(rig.image(&format!("{at}/a/b:1")).await.unwrap_err().code, Code::Unavailable, "not its own");

    registry.start_again().await.unwrap();
    assert!(!rig.image(&format!("{at}/a/b:1")).await.unwrap().stale);
}

#[tokio::test]
async fn a_registry_that_asks_for_a_pause_gets_it() {
    let (rig, registry) = (Rig::new(impatient()).await, DockerRegistry::start().await.unwrap());
    registry.push_image("a/b:1", "linux/amd64", &[("a", b"1")]).await.unwrap();
    registry.push_image("a/b:2", "linux/amd64", &[("a", b"2")]).await.unwrap();
    for status in [429, 503] {
        // Another address is another registry.
        let front = Front::before(registry.address()).await;
        let name = format!("{}/a/b", front.address);
        rig.image(&format!("{name}:1")).await.unwrap();
        front.say(Some((status, Some(120))));
        assert!(rig.image(&format!("{name}:1")).await.unwrap().stale);
        front.say(None);
        let asked = front.asked().len();
        let refusals = [
            rig.image(&format!("{name}:2")).await.unwrap_err(),
            rig.refreshed(&format!("{name}:2")).await.unwrap_err(),
            rig.find(&format!("{name}:1")).await.unwrap_err(),
        ];
        for refusal in refusals {
            assert_eq!(refusal.code, Code::Unavailable, "{refusal}");
            assert!(refusal.message.contains(" asked not to be asked for another 11"), "{refusal}");
            let limited = refusal.message.starts_with("upstream registry responds with 'too many request'");
            assert_eq!(limited, status == 429, "{refusal}");
        }
        assert!(rig.image(&format!("{name}:1")).await.unwrap().stale);
        assert_eq!(front.asked().len(), asked, "it was left alone");
    }
}

#[tokio::test]
async fn what_the_registry_denies_is_not_given_later() {
    let (rig, registry) = (Rig::new(impatient()).await, DockerRegistry::start().await.unwrap());
    registry.push_image("a/b:1", "linux/amd64", &[("a", b"1")]).await.unwrap();
    let front = Front::before(registry.address()).await;
    let tag = format!("{}/a/b:1", front.address);
    for (status, code) in [(404, Code::NotFound), (403, Code::PermissionDenied)] {
        front.say(None);
        rig.image(&tag).await.unwrap();
        front.say(Some((status, None)));
        let refusal = rig.image(&tag).await.unwrap_err();
        assert_eq!(refusal.code, code, "{refusal}");
        front.say(Some((502, None)));
        assert_eq!(rig.image(&tag).await.unwrap_err().code, Code::Unavailable);
    }
}
