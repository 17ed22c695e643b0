//! How long a token is used, and by whom.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::future::join_all;
use kiln_domain::reference::{Digest, ImageReference};
use kiln_registry::{Access, Credential, Error, Keyring, OciRegistry, Registry as _};
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::credentials::{LOGIN, access, basic, bearer_registry, found, image, token_service};
use crate::front::{Asked, Front, Reply};
use crate::{LONG, at_once, client};

fn tag(front: &Front, tag: usize) -> ImageReference {
    format!("{}/team/app:{tag}", front.address).parse().unwrap()
}

fn holding(front: &Front, credential: Credential) -> Access {
    let mut keyring = Keyring::default();
    keyring.put(&front.address, credential);
    let mut access = Access::new(Arc::new(keyring), Instant::now() + LONG);
    access.patience = Duration::ZERO;
    access
}

async fn ask(client: &OciRegistry, front: &Front, access: &Access) -> Result<Option<Digest>, Error> {
    client.digest(&image(front), access).await
}

/// Tokens with a number: `t1`, `t2`, …
async fn numbering_service() -> Front {
    let count = AtomicUsize::new(0);
    Front::start(move |_| {
        let number = count.fetch_add(1, Ordering::Relaxed) + 1;
        Reply::json(format!(r#"{{"token":"t{number}","expires_in":300}}"#))
    })
    .await
}

fn shown(front: &Front) -> Vec<Option<String>> {
    front.asked().iter().map(|asked| asked.authorization().map(str::to_owned)).collect()
}

#[tokio::test]
async fn many_who_ask_at_once_fetch_one_token_and_later_ones_show_it_unasked() {
    let service = token_service(300).await;
    let registry = bearer_registry(&service, |_| found()).await;
    let (client, access) = (client(), access(&[(&registry.address, LOGIN)]));
    let references: Vec<_> = (0..50).map(|number| tag(&registry, number)).collect();
    for answer in join_all(references.iter().map(|reference| client.digest(reference, &access))).await {
        assert_eq!(answer.unwrap(), Some(Digest::of(b"x")));
    }
    assert_eq!(service.asked().len(), 1);
    let before = registry.asked().len();
    ask(&client, &registry, &access).await.unwrap();
    assert_eq!((registry.asked().len() - before, service.asked().len()), (1, 1));
}

#[tokio::test]
async fn a_token_is_never_shown_for_another_credential() {
    let service = Front::start(|asked: &Asked| {
        let of = match asked.authorization() {
            Some(shown) if shown == basic("ann:a") => "ann",
            Some(shown) if shown == basic("bob:a") => "bob",
            Some(_) => return Reply::status(401),
            None => "nobody",
        };
        Reply::json(format!(r#"{{"token":"t-{of}"}}"#))
    })
    .await;
    let registry = bearer_registry(&service, |_| found()).await;
    let client = client();
    for _ in 0..2 {
        for (who, expected) in [
            (access(&[(&registry.address, "ann:a")]), Some("Bearer t-ann")),
            (access(&[(&registry.address, "bob:a")]), Some("Bearer t-bob")),
            (at_once(), Some("Bearer t-nobody")),
            (access(&[("127.0.0.1", "ann:a")]), Some("Bearer t-nobody")),
        ] {
            ask(&client, &registry, &who).await.unwrap();
            assert_eq!(shown(&registry).last().unwrap().as_deref(), expected);
        }
    }
    assert_eq!(service.asked().len(), 3);
    let wrong = access(&[(&registry.address, "ann:wrong")]);
    let error = ask(&client, &registry, &wrong).await.unwrap_err();
    assert!(matches!(error, Error::Unauthenticated { .. }), "{error}");
}

#[tokio::test]
async fn a_token_that_has_ended_is_not_shown_again() {
    let service = token_service(0).await;
    let registry = bearer_registry(&service, |_| found()).await;
    let (client, access) = (client(), access(&[(&registry.address, LOGIN)]));
    for times in 1..=3 {
        ask(&client, &registry, &access).await.unwrap();
        assert_eq!(service.asked().len(), times);
    }
}

#[tokio::test]
async fn a_token_that_the_registry_takes_no_more_is_replaced() {
    let service = numbering_service().await;
    let challenge = format!(r#"Bearer realm="http://{}/token""#, service.address);
    let valid = Arc::new(Mutex::new(BTreeSet::from(["Bearer t1".to_owned()])));
    let taken = valid.clone();
    let registry = Front::start(move |asked| match asked.authorization() {
        Some(shown) if taken.lock().unwrap().contains(shown) => found(),
        _ => Reply::status(401).header("www-authenticate", challenge.clone()),
    })
    .await;
    let (client, access) = (client(), access(&[(&registry.address, LOGIN)]));
    ask(&client, &registry, &access).await.unwrap();
    *valid.lock().unwrap() = BTreeSet::from(["Bearer t2".to_owned()]);
    ask(&client, &registry, &access).await.unwrap();
    ask(&client, &registry, &access).await.unwrap();
    let shown: Vec<_> = shown(&registry).into_iter().map(Option::unwrap_or_default).collect();
    assert_eq!(shown, ["", "Bearer t1", "Bearer t1", "Bearer t2", "Bearer t2"]);
    assert_eq!(service.asked().len(), 2);
}

#[tokio::test]
async fn a_registry_that_moves_to_another_token_service_is_followed() {
    let (old, new) = (Front::start(|_| Reply::status(404)).await, numbering_service().await);
    let first = numbering_service().await;
    let place = Arc::new(Mutex::new(first.address.clone()));
    let named = place.clone();
    let registry = Front::start(move |asked| match asked.authorization() {
        Some(_) => found(),
        None => {
            let realm = named.lock().unwrap().clone();
            Reply::status(401).header("www-authenticate", format!(r#"Bearer realm="http://{realm}/""#))
        }
    })
    .await;
    let client = client();
    ask(&client, &registry, &at_once()).await.unwrap();
    *place.lock().unwrap() = old.address.clone();
    let login = access(&[(&registry.address, LOGIN)]);
    drop(first);
    let error = ask(&client, &registry, &login).await.unwrap_err();
    assert!(error.to_string().contains("token service is not there"), "{error}");
    *place.lock().unwrap() = new.address.clone();
    assert!(ask(&client, &registry, &login).await.unwrap().is_some());
    assert_eq!(new.asked().len(), 1);
}

#[tokio::test]
async fn who_gives_up_does_not_take_the_others_along() {
    let silent = AtomicBool::new(true);
    let service = Front::start(move |_| {
        if silent.swap(false, Ordering::Relaxed) { Reply::Silence } else { Reply::json(r#"{"token":"t"}"#) }
    })
    .await;
    let registry = bearer_registry(&service, |_| found()).await;
    let client = Arc::new(client());
    let access = access(&[(&registry.address, LOGIN)]);
    let mut hasty = JoinSet::new();
    hasty.spawn({
        let (client, access, reference) = (client.clone(), access.clone(), image(&registry));
        async move { client.digest(&reference, &access).await }
    });
    while service.asked().is_empty() {
        tokio::task::yield_now().await;
    }
    let reference = image(&registry);
    let mut patient = Box::pin(client.digest(&reference, &access));
    assert!(futures::poll!(&mut patient).is_pending());
    hasty.shutdown().await;
    assert!(patient.await.unwrap().is_some());
    assert_eq!(service.asked().len(), 2);
}

#[tokio::test]
async fn an_identity_token_is_posted_to_the_token_service_and_seen_by_nobody_else() {
    let service = Front::start(|asked: &Asked| {
        let body = String::from_utf8_lossy(&asked.body);
        let posted = asked.method == "POST" && body.contains("grant_type=refresh_token");
        if posted && body.contains("refresh_token=re%2Ffresh") {
            Reply::json(r#"{"access_token":"t1","expires_in":300}"#)
        } else {
            Reply::status(401)
        }
    })
    .await;
    let registry = bearer_registry(&service, |_| found()).await;
    let access = holding(&registry, Credential::IdentityToken("re/fresh".into()));
    assert!(ask(&client(), &registry, &access).await.unwrap().is_some());
    let asked = service.asked();
    assert_eq!((asked.len(), asked[0].target.as_str(), asked[0].authorization()), (1, "/token", None));
    let body = String::from_utf8_lossy(&asked[0].body).into_owned();
    assert!(
        body.ends_with("client_id=kiln&scope=repository%3Ateam%2Fapp%3Apull&service=reg%2C+istry"),
        "{body}"
    );
    assert_eq!(shown(&registry), [None, Some("Bearer t1".to_owned())]);

    let wrong = holding(&registry, Credential::IdentityToken("other".into()));
    let error = ask(&client(), &registry, &wrong).await.unwrap_err();
    assert!(matches!(error, Error::Unauthenticated { .. }), "{error}");
}

#[tokio::test]
async fn a_registry_token_is_shown_as_it_is() {
    let service = numbering_service().await;
    let registry = bearer_registry(&service, |_| found()).await;
    let access = holding(&registry, Credential::RegistryToken("t-own".into()));
    assert!(ask(&client(), &registry, &access).await.unwrap().is_some());
    assert_eq!(shown(&registry), [None, Some("Bearer t-own".to_owned())]);
    assert_eq!(service.asked().len(), 0);
}
