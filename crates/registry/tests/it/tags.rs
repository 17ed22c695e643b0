use std::sync::Arc;

use kiln_registry::{Access, Keyring};
use kiln_testkit::registry::{DockerRegistry, PASSWORD, USERNAME};

use crate::{at_once, client};

/// [`at_once`], with the password for what is written alone.
fn as_keeper(registry: &DockerRegistry) -> Access {
    let mut keyring = Keyring::default();
    keyring.insert(registry.address(), &format!("{USERNAME}:{PASSWORD}").into()).unwrap();
    Access { push_keychain: Some(Arc::new(keyring)), ..at_once() }
}

#[tokio::test]
async fn tags_are_listed_marked_and_deleted() {
    let registry = DockerRegistry::start_with_password().await.unwrap();
    let digest = registry.push_image("base-cache:a", "linux/amd64", &[("x", &[7; 5000])]).await.unwrap();
    let (client, access) = (client(), as_keeper(&registry));
    let reference = registry.reference("base-cache:a").unwrap();

    let before = client.tagged(&reference, &access).await.unwrap().unwrap();
    assert_eq!((&before.digest, &before.created), (&digest, &None));
    assert!((5000..9000).contains(&before.bytes), "{before:?}");
    client.mark(&reference, &["b"], "2026-11-24T00:00:00Z", &access).await.unwrap();
    let mut tags = client.tags(&reference, &access).await.unwrap();
    tags.sort_unstable();
    assert_eq!(tags, ["a", "b"]);
    for tag in tags {
        let reference = registry.reference(&format!("base-cache:{tag}")).unwrap();
        let marked = client.tagged(&reference, &access).await.unwrap().unwrap();
        assert_eq!(marked.created.as_deref(), Some("2026-11-24T00:00:00Z"), "{tag}");
        assert_eq!(marked.bytes, before.bytes);
    }

    let marked = client.tagged(&reference, &access).await.unwrap().unwrap();
    for _ in 0..2 {
        client.delete(&reference.pinned(&marked.digest), &access).await.unwrap();
    }
    assert_eq!(client.tagged(&reference, &access).await.unwrap(), None);
    assert_eq!(client.tags(&reference, &access).await.unwrap(), Vec::<String>::new());
    let nowhere = registry.reference("no/such").unwrap();
    assert_eq!(client.tags(&nowhere, &access).await.unwrap(), Vec::<String>::new());
}

#[tokio::test]
async fn more_tags_than_one_answer_has() {
    let registry = DockerRegistry::start().await.unwrap();
    let image = registry.push_image("many:0", "linux/amd64", &[("x", b"y")]).await.unwrap();
    let (media_type, manifest) = registry.manifest("many", image.as_str()).await.unwrap().unwrap();
    for tag in 1..105 {
        registry.push_manifest("many", &tag.to_string(), &media_type, &manifest).await.unwrap();
    }
    let tags = client().tags(&registry.reference("many").unwrap(), &at_once()).await.unwrap();
    assert_eq!(tags.len(), 105);
}
