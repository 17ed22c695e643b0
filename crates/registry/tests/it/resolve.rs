use kiln_domain::reference::{Digest, ImageReference};
use kiln_registry::{Error, Registry as _};
use kiln_testkit::registry::{DockerRegistry, OCI_CONFIG, OCI_INDEX, OCI_MANIFEST, descriptor};
use serde_json::json;

use crate::{amd64, at_once, client};
use kiln_testkit::front::{Front, Reply};

const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";

#[tokio::test]
async fn a_single_image_is_its_own_manifest() {
    let registry = DockerRegistry::start().await.unwrap();
    let digest = registry.push_image("team/app:1", "linux/amd64", &[("a", b"b")]).await.unwrap();
    for name in ["team/app:1", &format!("team/app@{digest}"), &format!("team/app:9@{digest}")] {
        let reference = registry.reference(name).unwrap();
        let client = client();
        assert_eq!(client.resolve(&reference, &amd64(), &at_once()).await.unwrap(), digest, "{name}");
        assert_eq!(client.digest(&reference, &at_once()).await.unwrap(), Some(digest.clone()), "{name}");
    }
}

#[tokio::test]
async fn an_index_is_narrowed_down_to_the_platform() {
    let registry = DockerRegistry::start().await.unwrap();
    let platforms = ["linux/arm64", "linux/amd64", "linux/arm/v6", "linux/arm/v7"];
    let files = platforms.map(|platform| [("p", platform.as_bytes())]);
    let images: Vec<_> = platforms.into_iter().zip(files.iter().map(|files| &files[..])).collect();
    let (index, digests) = registry.push_index("app:1", &images).await.unwrap();
    let reference = registry.reference("app:1").unwrap();
    let client = client();
    for (platform, digest) in platforms.into_iter().zip(digests) {
        let found = client.resolve(&reference, &platform.parse().unwrap(), &at_once()).await.unwrap();
        assert_eq!(found, digest, "{platform}");
    }
    let error = client.resolve(&reference, &"linux/s390x".parse().unwrap(), &at_once()).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        format!(
            "no manifest for platform linux-s390x found in {reference} \
             (it has linux/arm64, linux/amd64, linux/arm/v6, linux/arm)"
        )
    );
    assert!(error.is_users());
    assert_eq!(client.digest(&reference, &at_once()).await.unwrap(), Some(index));
}

#[tokio::test]
async fn dockers_own_media_types_are_understood() {
    let registry = DockerRegistry::start().await.unwrap();
    let config = br#"{"os":"linux","architecture":"amd64","rootfs":{"type":"layers","diff_ids":[]}}"#;
    registry.push_blob("app", config).await.unwrap();
    let config = descriptor("application/vnd.docker.container.image.v1+json", config);
    let image =
        json!({"schemaVersion": 2, "mediaType": DOCKER_MANIFEST, "config": config, "layers": []}).to_string();
    let digest = registry.push_manifest("app", "single", DOCKER_MANIFEST, image.as_bytes()).await.unwrap();
    let entry = json!({
        "mediaType": DOCKER_MANIFEST, "digest": digest, "size": image.len(),
        "platform": {"os": "linux", "architecture": "amd64"},
    });
    let list = json!({"schemaVersion": 2, "mediaType": DOCKER_LIST, "manifests": [entry]}).to_string();
    registry.push_manifest("app", "list", DOCKER_LIST, list.as_bytes()).await.unwrap();
    for tag in ["app:single", "app:list"] {
        let reference = registry.reference(tag).unwrap();
        assert_eq!(client().resolve(&reference, &amd64(), &at_once()).await.unwrap(), digest, "{tag}");
    }
}

#[tokio::test]
async fn a_single_image_for_another_platform_is_none() {
    let registry = DockerRegistry::start().await.unwrap();
    registry.push_image("app:arm", "linux/arm64", &[("a", b"b")]).await.unwrap();
    let reference = registry.reference("app:arm").unwrap();
    let error = client().resolve(&reference, &amd64(), &at_once()).await.unwrap_err();
    let Error::NoPlatform { offered, .. } = error else { panic!("{error}") };
    assert_eq!(offered, ["linux/arm64"]);
}

#[tokio::test]
async fn an_image_that_names_no_platform_is_for_any() {
    let registry = DockerRegistry::start().await.unwrap();
    registry.push_blob("app", b"{}").await.unwrap();
    let image =
        json!({"schemaVersion": 2, "config": descriptor(OCI_CONFIG, b"{}"), "layers": []}).to_string();
    let digest = registry.push_manifest("app", "1", OCI_MANIFEST, image.as_bytes()).await.unwrap();
    let reference = registry.reference("app:1").unwrap();
    assert_eq!(client().resolve(&reference, &amd64(), &at_once()).await.unwrap(), digest);
}

#[tokio::test]
async fn entries_without_a_platform_and_nested_indexes_are_looked_into() {
    let registry = DockerRegistry::start().await.unwrap();
    let arm = registry.push_image("app:arm", "linux/arm64", &[("a", b"arm")]).await.unwrap();
    let amd = registry.push_image("app:amd", "linux/amd64", &[("a", b"amd")]).await.unwrap();
    let entry =
        |media_type: &str, digest: &Digest| json!({"mediaType": media_type, "digest": digest, "size": 1});
    let inner = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [entry(OCI_MANIFEST, &amd)]});
    let inner =
        registry.push_manifest("app", "inner", OCI_INDEX, inner.to_string().as_bytes()).await.unwrap();
    let entries = [entry(OCI_MANIFEST, &arm), entry(OCI_INDEX, &inner)];
    let outer = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}).to_string();
    registry.push_manifest("app", "outer", OCI_INDEX, outer.as_bytes()).await.unwrap();
    let reference = registry.reference("app:outer").unwrap();
    assert_eq!(client().resolve(&reference, &amd64(), &at_once()).await.unwrap(), amd);
}

#[tokio::test]
async fn a_search_through_an_index_has_an_end() {
    let registry = DockerRegistry::start().await.unwrap();
    let arm = registry.push_image("app:arm", "linux/arm64", &[("a", b"arm")]).await.unwrap();
    let entries = vec![json!({"mediaType": OCI_INDEX, "digest": arm, "size": 1}); 20];
    let index = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}).to_string();
    registry.push_manifest("app", "1", OCI_INDEX, index.as_bytes()).await.unwrap();
    let reference = registry.reference("app:1").unwrap();
    let error = client().resolve(&reference, &amd64(), &at_once()).await.unwrap_err();
    assert!(matches!(error, Error::Unsupported { .. }), "{error}");
}

#[tokio::test]
async fn what_is_not_there() {
    let registry = DockerRegistry::start().await.unwrap();
    registry.push_image("app:1", "linux/amd64", &[("a", b"b")]).await.unwrap();
    let absent = Digest::of(b"absent");
    for name in ["app:2", "other:1", &format!("app@{absent}")] {
        let reference = registry.reference(name).unwrap();
        let error = client().resolve(&reference, &amd64(), &at_once()).await.unwrap_err();
        assert!(matches!(error, Error::NotFound { .. }) && error.is_users(), "{error}");
        assert_eq!(error.to_string(), format!("{reference} does not exist"));
        assert_eq!(client().digest(&reference, &at_once()).await.unwrap(), None);
    }
}

#[tokio::test]
async fn a_get_answers_where_a_head_says_no_digest() {
    let content = json!({"schemaVersion": 2, "manifests": []}).to_string();
    let digest = Digest::of(content.as_bytes());
    for head_status in [200, 405] {
        let content = content.clone();
        let front = Front::start(move |asked| match asked.method.as_str() {
            "HEAD" => Reply::status(head_status),
            _ => Reply::json(content.clone()),
        })
        .await
        .unwrap();
        let reference: ImageReference = format!("{}/app:1", front.address).parse().unwrap();
        assert_eq!(client().digest(&reference, &at_once()).await.unwrap(), Some(digest.clone()));
        assert_eq!((front.count("HEAD", ""), front.count("GET", "")), (1, 1));
    }
}

#[tokio::test]
async fn a_digest_costs_one_head_and_what_is_not_there_no_get() {
    let registry = DockerRegistry::start().await.unwrap();
    registry.push_image("app:1", "linux/amd64", &[("a", b"b")]).await.unwrap();
    let upstream = registry.address().to_owned();
    let front = Front::start(move |_| Reply::Forward(upstream.clone())).await.unwrap();
    let (there, absent): (ImageReference, ImageReference) = (
        format!("{}/app:1", front.address).parse().unwrap(),
        format!("{}/app:2", front.address).parse().unwrap(),
    );
    assert!(client().digest(&there, &at_once()).await.unwrap().is_some());
    assert!(client().resolve(&absent, &amd64(), &at_once()).await.is_err());
    assert_eq!((front.count("HEAD", ""), front.count("GET", "")), (2, 0));
}
