//! Each way in which a registry can fail, in one table: what the caller is told, how many requests reached the registry, and
//! with which credentials. The registry wants a login before it fails.

use std::sync::Arc;

use kiln_domain::reference::Digest;
use kiln_registry::{Error, Problem, Registry as _};
use kiln_testkit::front::{Asked, Front, Reply};

use crate::credentials::{LOGIN, access, basic, image};
use crate::{amd64, client};

type Fails = Box<dyn Fn(&Asked) -> Reply + Send + Sync>;

/// What the caller is told, in a word.
fn told(error: &Error) -> &'static str {
    match error {
        Error::Limited { .. } => "limited",
        Error::Denied { .. } => "denied",
        Error::Unauthenticated { .. } => "unauthenticated",
        Error::NotFound { .. } => "not found",
        Error::Broken { .. } => "broken",
        Error::Unavailable { problem: Problem::Timeout, .. } => "no answer in time",
        Error::Unavailable { .. } => "unavailable",
        _ => "something else",
    }
}

/// A fault of each request that bears the login; all others are challenged.
async fn registry(fails: Fails) -> Front {
    Front::start(move |asked| match asked.authorization() {
        Some(shown) if shown == basic(LOGIN) => fails(asked),
        _ => Reply::status(401).header("www-authenticate", "Basic realm=\"r\""),
    })
    .await
    .unwrap()
}

/// The same for every request.
fn always(reply: impl Fn() -> Reply + Send + Sync + 'static) -> Fails {
    Box::new(move |_| reply())
}

/// HEAD says no digest, so that the manifest is read.
fn manifest(reply: impl Fn() -> Reply + Send + Sync + 'static) -> Fails {
    Box::new(move |asked| if asked.method == "HEAD" { Reply::status(200) } else { reply() })
}

#[tokio::test]
async fn each_fault_is_told_with_few_requests_and_no_login_goes_astray() {
    // Plays the host that a redirect leads to.
    let elsewhere = Arc::new(Front::start(|_| Reply::status(404)).await.unwrap());
    let away = elsewhere.address.clone();
    let wrong = || {
        Reply::json(r#"{"schemaVersion":2,"manifests":[]}"#)
            .header("docker-content-digest", Digest::of(b"another").to_string())
    };
    // The first request of each shows no login, and is challenged.
    let table: Vec<(&str, Fails, &str, usize)> = vec![
        ("500", always(|| Reply::status(500)), "unavailable", 2),
        ("503", always(|| Reply::status(503)), "unavailable", 2),
        ("429", always(|| Reply::status(429).header("retry-after", "60")), "limited", 2),
        ("401 to the login", always(|| Reply::status(401)), "unauthenticated", 2),
        ("403", always(|| Reply::status(403)), "denied", 2),
        ("cut", always(|| Reply::Hangup), "unavailable", 2),
        ("slow", always(|| Reply::Silence), "no answer in time", 2),
        ("wrong digest", manifest(wrong), "broken", 3),
        ("endless body", manifest(|| Reply::Endless), "broken", 3),
        ("no manifest", manifest(|| Reply::status(200).body("<html>")), "broken", 3),
        (
            "redirect to another host",
            manifest(move || Reply::status(307).header("location", format!("http://{away}/v2/x"))),
            "not found",
            3,
        ),
    ];
    for (fault, fails, expected, requests) in table {
        let registry = registry(fails).await;
        let mut access = access(&[(&registry.address, LOGIN)]);
        access.deadline = tokio::time::Instant::now() + std::time::Duration::from_secs(5);
        let error = client().resolve(&image(&registry), &amd64(), &access).await.unwrap_err();
        assert_eq!(told(&error), expected, "{fault}: {error}");
        assert!(!error.to_string().contains("pass:word"), "{fault}: {error}");
        let asked = registry.asked();
        let shown: Vec<Option<&str>> = asked.iter().map(Asked::authorization).collect();
        let mut logins = vec![None];
        let login = basic(LOGIN);
        logins.resize(requests, Some(login.as_str()));
        assert_eq!(shown, logins, "{fault}");
    }
    let strays = elsewhere.asked();
    assert!(!strays.is_empty() && strays.iter().all(|asked| asked.authorization().is_none()), "{strays:?}");
}
