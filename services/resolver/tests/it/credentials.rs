//! Whose credentials a question is answered with.

use kiln_contract::error::Code;
use kiln_contract::secrets::RegistryAuth;
use kiln_credentials::{Config as CredentialsConfig, Installation};
use kiln_resolver::Config;
use kiln_testkit::registry::{DockerRegistry, PASSWORD, USERNAME};
use tempfile::TempDir;

use crate::rig::Rig;

/// An installation with a login for one registry.
async fn installation(folder: &TempDir, registry: &str, password: &str) -> Installation {
    let path = folder.path().join("config.json");
    let login = serde_json::json!({"username": USERNAME, "password": password});
    let file = serde_json::json!({"auths": {registry: login}});
    std::fs::write(&path, file.to_string()).unwrap();
    let config = CredentialsConfig { docker_config: Some(path), ..Default::default() };
    Installation::open(&config, &mut Default::default()).await.unwrap()
}

fn all() -> RegistryAuth {
    RegistryAuth { allow_all: true, ..Default::default() }
}

fn selected(host: &str) -> RegistryAuth {
    RegistryAuth { allowed_hosts: vec![host.into()], ..Default::default() }
}

fn own(host: &str, password: &str) -> RegistryAuth {
    let credentials = [(host.to_owned(), format!("{USERNAME}:{password}"))].into();
    RegistryAuth { credentials, ..Default::default() }
}

#[tokio::test]
async fn the_installations_credentials_are_for_who_may_use_them_from_the_cache_too() {
    let registry = DockerRegistry::start_with_password().await.unwrap();
    let digest = registry.push_image("a/b:1", "linux/amd64", &[("a", b"1")]).await.unwrap();
    let at = registry.address();
    let folder = TempDir::new().unwrap();
    let rig = Rig::of(Config::default(), installation(&folder, at, PASSWORD).await).await;
    let (reference, resolved) = (format!("{at}/a/b:1"), format!("{at}/a/b@{digest}"));
    let own_and_all = RegistryAuth { allow_all: true, ..own(at, "wrong") };
    // In this order: what a permitted question has cached must not be given to the others.
    for (auth, may) in [
        (selected(at), true),
        (RegistryAuth::default(), false),
        (selected("127.0.0.1"), false),
        (selected(&format!("{at}.evil.test")), false),
        (all(), true),
        (own(at, PASSWORD), true),
        (own(at, "wrong"), false),
        // The caller's own win, even where they are of no use.
        (own_and_all, false),
        (RegistryAuth::default(), false),
    ] {
        let shown = format!("{:?} {:?} {}", auth.allow_all, auth.allowed_hosts, auth.credentials.len());
        match rig.image_with(&reference, auth).await {
            Ok(answer) => assert!(may && answer.reference == resolved, "{shown}: {answer:?}"),
            Err(refusal) => assert!(!may && refusal.code == Code::Unauthenticated, "{shown}: {refusal}"),
        }
    }
    assert_eq!(rig.find(&reference).await.unwrap(), digest.to_string(), "its own images are its own");
}

#[tokio::test]
async fn an_answer_of_the_installations_outlives_the_registry_for_who_may_have_it() {
    let mut registry = DockerRegistry::start_with_password().await.unwrap();
    registry.push_image("a/b:1", "linux/amd64", &[("a", b"1")]).await.unwrap();
    let at = registry.address().to_owned();
    let folder = TempDir::new().unwrap();
    let config = Config { tag_fresh_seconds: 0, ..Config::default() };
    let rig = Rig::of(config, installation(&folder, &at, PASSWORD).await).await;
    let reference = format!("{at}/a/b:1");
    assert!(!rig.image_with(&reference, all()).await.unwrap().stale);
    registry.stop();
    assert!(rig.image_with(&reference, selected(&at)).await.unwrap().stale);
    for stranger in [RegistryAuth::default(), own(&at, PASSWORD)] {
        assert_eq!(rig.image_with(&reference, stranger).await.unwrap_err().code, Code::Unavailable);
    }
}
