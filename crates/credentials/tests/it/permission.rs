use std::sync::Arc;

use kiln_credentials::{Config, Owner, Permission, Permitted};
use kiln_registry::Keyring;
use tempfile::TempDir;

use crate::{logins, open, password};

#[tokio::test]
async fn the_requests_own_win_and_the_installations_are_only_those_allowed() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("config.json");
    std::fs::write(&path, logins(&[("a.test", "i", "i"), ("b.test", "i", "i"), ("docker.io", "i", "i")]))
        .unwrap();
    let (installation, _) = open(&Config { docker_config: Some(path), ..Config::default() }).await;
    let installation = Arc::new(installation);
    let mut own = Keyring::default();
    own.insert("a.test", &"me:own".into()).unwrap();
    own.insert("mine.test", &"me:own".into()).unwrap();
    let selected = Permission::selected(["https://index.docker.io/v1/", "a.test", "none.test"]);
    let looks_alike = Permission::selected(["test", "b.test.evil.test", "b.test:5000"]);
    // What is shown to a.test, b.test, docker.io; and the registries that are known by name.
    for (permission, own, shown, known) in [
        (Permission::None, Keyring::default(), [None, None, None], ""),
        (Permission::None, own.clone(), [Some("own"), None, None], "a.test mine.test"),
        (selected.clone(), Keyring::default(), [Some("i"), None, Some("i")], "a.test docker.io none.test"),
        (selected, own.clone(), [Some("own"), None, Some("i")], "a.test docker.io mine.test none.test"),
        (looks_alike, Keyring::default(), [None, None, None], "b.test.evil.test b.test:5000 test"),
        (Permission::All, Keyring::default(), [Some("i"), Some("i"), Some("i")], "a.test b.test docker.io"),
        (Permission::All, own, [Some("own"), Some("i"), Some("i")], "a.test b.test docker.io mine.test"),
    ] {
        let permitted = Permitted::new(own, installation.clone(), permission.clone());
        for (registry, shown) in ["a.test", "b.test", "docker.io"].into_iter().zip(shown) {
            assert_eq!(password(&permitted, registry).await.as_deref(), shown, "{permission:?}: {registry}");
            let owner = permitted.owner(registry).await;
            let agrees = match shown {
                None => matches!(owner, Owner::Nobody),
                Some("own") => matches!(owner, Owner::Request(_)),
                Some(_) => matches!(owner, Owner::Installation),
            };
            assert!(agrees, "{permission:?}: {registry}: {owner:?}");
        }
        assert_eq!(permitted.registries().await.join(" "), known, "{permission:?}");
        for stranger in ["a.test.evil.test", "xa.test", "a.test:443", "auth.docker.io"] {
            assert_eq!(password(&permitted, stranger).await, None, "{permission:?}: {stranger}");
        }
    }
}
