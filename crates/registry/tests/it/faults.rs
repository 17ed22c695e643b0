use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use kiln_domain::reference::{Digest, ImageReference};
use kiln_domain::registries::Reach;
use kiln_registry::{Access, Config, Error, OciRegistry, Problem, Registry as _};
use kiln_testkit::registry::DockerRegistry;
use tokio::time::Instant;

use crate::{LONG, amd64, at_once, client};
use kiln_testkit::front::{Asked, Front, Reply};

async fn resolve(front: &Front, access: &Access) -> Result<Digest, Error> {
    client().resolve(&image(front), &amd64(), access).await
}

fn image(front: &Front) -> ImageReference {
    format!("{}/team/app:1", front.address).parse().unwrap()
}

/// A front that has no HEAD, so that its answers count.
async fn answering(reply: impl Fn(&Asked) -> Reply + Send + Sync + 'static) -> Front {
    Front::start(move |asked| if asked.method == "HEAD" { Reply::status(405) } else { reply(asked) })
        .await
        .unwrap()
}

#[tokio::test]
async fn a_dead_port_is_unavailable() {
    let mut registry = DockerRegistry::start().await.unwrap();
    registry.stop();
    let error = client().digest(&registry.reference("app:1").unwrap(), &at_once()).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("registry {} cannot be asked: connection refused", registry.address())
    );
    assert!(!error.is_users());
}

#[tokio::test]
async fn a_host_that_does_not_exist_is_named() {
    let reference: ImageReference = "no-such-registry.invalid/app:1".parse().unwrap();
    let error = client().digest(&reference, &at_once()).await.unwrap_err();
    assert!(
        matches!(&error, Error::UnknownHost { registry } if registry == "no-such-registry.invalid"),
        "{error}"
    );
    assert!(error.is_users());
}

#[tokio::test]
async fn what_speaks_no_tls_is_not_tried_again() {
    let registry = DockerRegistry::start().await.unwrap();
    let reach = Reach { plain_http: Some(false), ..Reach::default() };
    let registries = [(registry.address().to_owned(), reach)].into_iter().collect();
    let client = OciRegistry::new(Config { registries, ..Config::default() });
    let (image, access) = (registry.reference("app:1").unwrap(), Access::anonymous(LONG));
    let asked = client.digest(&image, &access);
    let error = tokio::time::timeout(Duration::from_secs(10), asked).await.unwrap().unwrap_err();
    assert!(matches!(error, Error::Unavailable { problem: Problem::Tls(_), .. }), "{error}");
}

#[tokio::test]
async fn a_limit_is_told_at_once_with_its_time() {
    let front = Front::start(|_| Reply::status(429).header("retry-after", "17")).await.unwrap();
    let error = resolve(&front, &Access::anonymous(LONG)).await.unwrap_err();
    assert!(matches!(error, Error::Limited { .. }) && !error.is_users(), "{error}");
    assert_eq!(error.retry_after(), Some(Duration::from_secs(17)));
    assert_eq!(front.asked().len(), 1);
}

#[tokio::test]
async fn a_limit_is_waited_out_if_that_is_asked_for_and_there_is_time() {
    let count = AtomicUsize::new(0);
    let front = Front::start(move |_| match count.fetch_add(1, Ordering::Relaxed) {
        0 => Reply::status(429).header("retry-after", "1"),
        _ => Reply::status(200).header("docker-content-digest", Digest::of(b"x").to_string()),
    })
    .await
    .unwrap();
    let mut access = Access::anonymous(LONG);
    access.wait_out_limits = true;
    let start = Instant::now();
    assert_eq!(client().digest(&image(&front), &access).await.unwrap(), Some(Digest::of(b"x")));
    assert!(start.elapsed() >= Duration::from_secs(1));

    let front = Front::start(|_| Reply::status(429).header("retry-after", "100")).await.unwrap();
    let error = client().digest(&image(&front), &access).await.unwrap_err();
    assert!(matches!(error, Error::Limited { .. }), "{error}");
    assert_eq!(front.asked().len(), 1);
}

#[tokio::test]
async fn what_may_pass_is_tried_again() {
    let count = AtomicUsize::new(0);
    let front = Front::start(move |_| match count.fetch_add(1, Ordering::Relaxed) {
        0 => Reply::status(503),
        1 => Reply::Hangup,
        2 => Reply::status(500),
        _ => Reply::status(200).header("docker-content-digest", Digest::of(b"x").to_string()),
    })
    .await
    .unwrap();
    let found = client().digest(&image(&front), &Access::anonymous(LONG)).await.unwrap();
    assert_eq!((found, front.asked().len()), (Some(Digest::of(b"x")), 4));
}

#[tokio::test]
async fn a_registry_that_stays_ill_is_unavailable_when_patience_ends() {
    let front = Front::start(|_| Reply::status(503).header("retry-after", "0")).await.unwrap();
    let mut access = Access::anonymous(LONG);
    access.patience = Duration::from_millis(500);
    let error = client().digest(&image(&front), &access).await.unwrap_err();
    assert!(matches!(error, Error::Unavailable { problem: Problem::Status(503), .. }), "{error}");
    assert!(front.asked().len() > 1);
}

#[tokio::test]
async fn silence_ends_at_the_deadline() {
    let front = Front::start(|_| Reply::Silence).await.unwrap();
    let error = resolve(&front, &Access::anonymous(Duration::from_millis(300))).await.unwrap_err();
    assert!(matches!(error, Error::Unavailable { problem: Problem::Timeout, .. }), "{error}");

    let client =
        OciRegistry::new(Config { request_timeout: Duration::from_millis(100), ..Config::default() });
    let error = client.digest(&image(&front), &at_once()).await.unwrap_err();
    assert!(matches!(error, Error::Unavailable { problem: Problem::Timeout, .. }), "{error}");
}

#[tokio::test]
async fn what_cannot_be_the_image_is_broken() {
    const VALID: &str = r#"{"schemaVersion":2,"manifests":[]}"#;
    let check = async |reply: fn() -> Reply, expected: &str| {
        let front = answering(move |_| reply()).await;
        let error = resolve(&front, &at_once()).await.unwrap_err();
        assert!(matches!(error, Error::Broken { .. }) && !error.is_users(), "{error}");
        let (error, reference) = (error.to_string(), image(&front).to_string());
        assert!(error.starts_with(&reference) && error.contains(expected), "{error}");
    };
    check(|| Reply::Endless, "larger than 4 MiB").await;
    check(|| Reply::status(200).body("<html>"), "cannot be read").await;
    check(
        || Reply::json(VALID).header("docker-content-digest", Digest::of(b"x").to_string()),
        "its digest is",
    )
    .await;
    check(|| Reply::status(302).header("location", "ftp://x/"), "redirected to ftp://x").await;
    check(|| Reply::status(302).header("location", "/v2/again"), "redirected more than 5 times").await;
}

#[tokio::test]
async fn an_image_without_its_config_is_broken() {
    let config = Digest::of(b"x");
    let descriptor = format!(r#"{{"mediaType":"x","digest":"{config}","size":1}}"#);
    let front = answering(move |asked| {
        if asked.target.contains("/blobs/") {
            return Reply::status(404);
        }
        Reply::json(format!(r#"{{"schemaVersion":2,"config":{descriptor},"layers":[]}}"#))
    })
    .await;
    let error = resolve(&front, &at_once()).await.unwrap_err().to_string();
    assert_eq!(error, format!("{} is broken in its registry: its config {config} is missing", image(&front)));
}

#[tokio::test]
async fn a_pinned_digest_is_checked() {
    let front = answering(|_| Reply::json(r#"{"schemaVersion":2,"manifests":[]}"#)).await;
    let pinned = image(&front).pinned(&Digest::of(b"another"));
    let error = client().resolve(&pinned, &amd64(), &at_once()).await.unwrap_err();
    assert!(matches!(error, Error::Broken { .. }), "{error}");
}

#[tokio::test]
async fn schema_1_and_other_digests_are_not_supported() {
    for manifest in [
        r#"{"schemaVersion":1,"name":"x","tag":"1","fsLayers":[],"history":[]}"#.to_owned(),
        format!(
            r#"{{"schemaVersion":2,"config":{{"mediaType":"x","digest":"sha512:{}","size":1}},"layers":[]}}"#,
            "a".repeat(128)
        ),
    ] {
        let front = answering(move |_| Reply::json(manifest.clone())).await;
        let error = resolve(&front, &at_once()).await.unwrap_err();
        assert!(matches!(error, Error::Unsupported { .. }) && error.is_users(), "{error}");
    }
}
