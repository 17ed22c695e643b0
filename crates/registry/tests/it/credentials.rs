use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use base64::Engine as _;
use kiln_domain::reference::{Digest, ImageReference};
use kiln_registry::{Access, Error, Keyring, Registry as _};
use kiln_testkit::registry::{DockerRegistry, PASSWORD, USERNAME};
use tokio::time::Instant;

use crate::{LONG, amd64, at_once, client};
use kiln_testkit::front::{Asked, Front, Reply};

pub(crate) const LOGIN: &str = "me:pass:word";

pub(crate) fn access(logins: &[(&str, &str)]) -> Access {
    let mut keyring = Keyring::default();
    for (registry, login) in logins {
        keyring.insert(registry, &(*login).into()).unwrap();
    }
    let mut access = Access::new(Arc::new(keyring), Instant::now() + LONG);
    access.patience = std::time::Duration::ZERO;
    access
}

pub(crate) fn basic(login: &str) -> String {
    format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(login))
}

pub(crate) fn image(front: &Front) -> ImageReference {
    format!("{}/team/app:1", front.address).parse().unwrap()
}

pub(crate) fn found() -> Reply {
    Reply::status(200).header("docker-content-digest", Digest::of(b"x").to_string())
}

/// A token service that knows [`LOGIN`], and gives what it is asked for as a token.
pub(crate) async fn token_service(expires_in: u64) -> Front {
    Front::start(move |asked| match asked.authorization() {
        Some(shown) if shown != basic(LOGIN) => Reply::status(401),
        _ => {
            let token = format!("t{}", asked.target.len());
            Reply::json(format!(
                r#"{{"token":"{token}","access_token":"{token}","expires_in":{expires_in}}}"#
            ))
        }
    })
    .await
    .unwrap()
}

/// A registry that wants a token of `service`.
pub(crate) async fn bearer_registry(
    service: &Front,
    reply: impl Fn(&Asked) -> Reply + Send + Sync + 'static,
) -> Front {
    let challenge = format!(
        r#"Bearer realm="http://{}/token",service="reg, istry",scope="repository:team/app:pull""#,
        service.address
    );
    Front::start(move |asked| match asked.authorization() {
        Some(shown) if shown.starts_with("Bearer t") => reply(asked),
        _ => Reply::status(401).header("www-authenticate", challenge.clone()),
    })
    .await
    .unwrap()
}

#[tokio::test]
async fn a_real_registry_with_a_password() {
    let registry = DockerRegistry::start_with_password().await.unwrap();
    let digest = registry.push_image("team/app:1", "linux/amd64", &[("a", b"b")]).await.unwrap();
    let reference = registry.reference("team/app:1").unwrap();
    let right = access(&[(registry.address(), &format!("{USERNAME}:{PASSWORD}"))]);
    assert_eq!(client().resolve(&reference, &amd64(), &right).await.unwrap(), digest);
    for (name, to) in [("mounted", "ws/mounted:1"), ("tagged", "team/app:2")] {
        let to = registry.reference(to).unwrap();
        let copied =
            client().copy(&reference, &to, Some(&amd64()), &right, &mut |_| Ok(Box::new(()))).await.unwrap();
        assert_eq!(copied, digest, "{name}");
    }
    let open = DockerRegistry::start().await.unwrap();
    let to = open.reference("ws:1").unwrap();
    assert_eq!(
        client().copy(&reference, &to, Some(&amd64()), &right, &mut |_| Ok(Box::new(()))).await.unwrap(),
        digest
    );
    let back = registry.reference("back:1").unwrap();
    assert_eq!(
        client().copy(&to, &back, Some(&amd64()), &right, &mut |_| Ok(Box::new(()))).await.unwrap(),
        digest
    );

    for wrong in [at_once(), access(&[(registry.address(), "kiln:wrong")]), access(&[("127.0.0.1", LOGIN)])] {
        let error = client().resolve(&reference, &amd64(), &wrong).await.unwrap_err();
        assert!(matches!(error, Error::Unauthenticated { .. }) && error.is_users(), "{error}");
    }
}

#[tokio::test]
async fn a_token_is_fetched_with_the_credential_and_the_registry_sees_the_token_alone() {
    let service = token_service(300).await;
    let registry = bearer_registry(&service, |_| found()).await;
    let access = access(&[(&registry.address, LOGIN), (&service.address, "not:asked-for")]);
    assert_eq!(client().digest(&image(&registry), &access).await.unwrap(), Some(Digest::of(b"x")));
    let asked = service.asked();
    assert_eq!(asked.len(), 1);
    assert_eq!(asked[0].authorization(), Some(basic(LOGIN).as_str()));
    assert_eq!(asked[0].target, "/token?service=reg%2C+istry&scope=repository%3Ateam%2Fapp%3Apull");
    let shown: Vec<_> =
        registry.asked().iter().map(|asked| asked.authorization().map(str::to_owned)).collect();
    assert_eq!(shown.len(), 2);
    assert_eq!(shown[0], None);
    assert!(shown[1].as_ref().unwrap().starts_with("Bearer t"));
}

#[tokio::test]
async fn without_a_credential_the_token_is_an_anonymous_one() {
    let service = token_service(300).await;
    let registry = bearer_registry(&service, |_| found()).await;
    assert!(client().digest(&image(&registry), &at_once()).await.unwrap().is_some());
    assert_eq!(service.asked()[0].authorization(), None);
}

#[tokio::test]
async fn what_a_token_service_refuses_is_refused() {
    let service = token_service(300).await;
    let registry = bearer_registry(&service, |_| found()).await;
    let wrong = access(&[(&registry.address, "me:wrong")]);
    let error = client().digest(&image(&registry), &wrong).await.unwrap_err();
    assert!(matches!(error, Error::Unauthenticated { .. }), "{error}");
    assert!(!error.to_string().contains("wrong"));

    for (reply, expected) in [
        (Reply::status(403), "is denied"),
        (Reply::status(302).header("location", "http://127.0.0.1:1/"), "its token service redirects"),
        (Reply::status(404), "its token service is not there"),
        (Reply::json(r#"{"token":""}"#), "is no token"),
        (Reply::json(r#"["s3cret"]"#), "is no token"),
        (Reply::json("{\"token\":\"a\\nb\"}"), "is no token"),
        (Reply::status(429), "limits requests"),
    ] {
        let reply = std::sync::Mutex::new(Some(reply));
        let service = Front::start(move |_| reply.lock().unwrap().take().unwrap()).await.unwrap();
        let registry = bearer_registry(&service, |_| found()).await;
        let login = access(&[(&registry.address, LOGIN)]);
        let error = client().digest(&image(&registry), &login).await.unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
        assert!(!error.to_string().contains("s3cret"), "{error}");
    }
}

#[tokio::test]
async fn a_token_that_is_not_enough_is_renewed_once() {
    let service = token_service(300).await;
    let registry = Front::start({
        let challenge = format!(r#"Bearer realm="http://{}/token""#, service.address);
        move |_| Reply::status(401).header("www-authenticate", challenge.clone())
    })
    .await
    .unwrap();
    let login = access(&[(&registry.address, LOGIN)]);
    let error = client().digest(&image(&registry), &login).await.unwrap_err();
    assert!(matches!(error, Error::Unauthenticated { .. }), "{error}");
    assert_eq!((registry.asked().len(), service.asked().len()), (2, 1));
}

#[tokio::test]
async fn one_token_for_each_side_does_for_a_whole_copy() {
    let real = DockerRegistry::start().await.unwrap();
    let digest = real.push_image("team/app:1", "linux/amd64", &[("a", b"b")]).await.unwrap();
    for (expires_in, most) in [(300, 2), (0, 100)] {
        let service = token_service(expires_in).await;
        let upstream = real.address().to_owned();
        let registry = bearer_registry(&service, move |_| Reply::Forward(upstream.clone())).await;
        let to: ImageReference = format!("{}/ws/app:{expires_in}", registry.address).parse().unwrap();
        let login = access(&[(&registry.address, LOGIN)]);
        let copied = client()
            .copy(&image(&registry), &to, Some(&amd64()), &login, &mut |_| Ok(Box::new(())))
            .await
            .unwrap();
        assert_eq!(copied, digest);
        let asked = service.asked();
        assert!(asked.len() >= 2 && asked.len() <= most, "{asked:?}");
        let pushes = "scope=repository%3Ateam%2Fapp%3Apull&scope=repository%3Aws%2Fapp%3Apull%2Cpush";
        assert!(asked.iter().any(|asked| asked.target.ends_with(pushes)), "{asked:?}");
    }
}

#[tokio::test]
async fn no_credential_crosses_a_redirect() {
    for wanted in ["basic", "bearer"] {
        // The other host even asks for what it must not get.
        let other = Front::start(|asked| match asked.target.as_str() {
            "/please" => Reply::status(401).header("www-authenticate", "Basic realm=\"x\""),
            _ => found(),
        })
        .await
        .unwrap();
        let service = token_service(300).await;
        let (place, realm) = (other.address.clone(), service.address.clone());
        let count = AtomicUsize::new(0);
        let registry = Front::start(move |asked| match asked.authorization() {
            Some(_) => {
                let path = ["blob?signed=1", "please"][count.fetch_add(1, Ordering::Relaxed)];
                Reply::status(307).header("location", format!("http://{place}/{path}"))
            }
            None if wanted == "basic" => Reply::status(401).header("www-authenticate", "Basic realm=\"r\""),
            None => {
                Reply::status(401).header("www-authenticate", format!("Bearer realm=\"http://{realm}/t\""))
            }
        })
        .await
        .unwrap();
        let login = access(&[(&registry.address, LOGIN), (&other.address, "other:login")]);
        assert_eq!(client().digest(&image(&registry), &login).await.unwrap(), Some(Digest::of(b"x")));
        let error = client().digest(&image(&registry), &login).await.unwrap_err();
        assert!(matches!(error, Error::Unauthenticated { .. }), "{error}");
        let asked = other.asked();
        assert_eq!(asked.len(), 2);
        assert!(asked.iter().all(|asked| asked.authorization().is_none()), "{asked:?}");
    }
}

#[tokio::test]
async fn an_upload_at_another_host_gets_the_blob_and_no_credential() {
    let source = DockerRegistry::start().await.unwrap();
    source.push_image("app:1", "linux/amd64", &[("a", b"b")]).await.unwrap();
    let storage = Front::start(|_| Reply::status(201)).await.unwrap();
    let place = storage.address.clone();
    let registry = Front::start(move |asked| match (asked.authorization(), asked.method.as_str()) {
        (None, _) => Reply::status(401).header("www-authenticate", "Basic realm=\"r\""),
        (_, "HEAD") => Reply::status(404),
        (_, "POST") => Reply::status(202).header("location", format!("http://{place}/upload?state=1")),
        _ => Reply::status(201),
    })
    .await
    .unwrap();
    let login = access(&[(&registry.address, LOGIN)]);
    let from = source.reference("app:1").unwrap();
    client().copy(&from, &image(&registry), Some(&amd64()), &login, &mut |_| Ok(Box::new(()))).await.unwrap();
    let asked = storage.asked();
    assert_eq!(asked.len(), 2);
    assert!(asked.iter().all(|asked| asked.is("PUT", "/upload?state=1&digest=sha256%3A")), "{asked:?}");
    assert!(asked.iter().all(|asked| asked.authorization().is_none() && !asked.body.is_empty()));
}
