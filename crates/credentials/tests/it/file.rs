use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::Duration;

use kiln_credentials::{Config, Installation};
use kiln_registry::Keychain;
use tempfile::TempDir;

use crate::{logins, metric, open, password};

fn of(path: &Path) -> Config {
    Config { docker_config: Some(path.to_owned()), ..Config::default() }
}

/// Waits until the file's change is noticed: it is looked at once a second.
async fn until(keychain: &impl Keychain, registry: &str, expected: &str) {
    let noticed = async {
        while password(keychain, registry).await.as_deref() != Some(expected) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), noticed).await.unwrap();
}

#[tokio::test]
async fn a_changed_file_is_read_anew_and_a_broken_one_leaves_what_was() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("config.json");
    fs::write(&path, logins(&[("r.test", "u", "one"), ("docker.io", "hub", "h")])).unwrap();
    let (installation, metrics) = open(&of(&path)).await;
    assert_eq!(password(&installation, "r.test").await.as_deref(), Some("one"));
    assert_eq!(password(&installation, "docker.io").await.as_deref(), Some("h"));
    for other in ["r.test:443", "r.test.evil.test", "evil-r.test", "R.test", "test"] {
        assert_eq!(password(&installation, other).await, None, "{other}");
    }
    // In place, and of the same size.
    fs::write(&path, logins(&[("r.test", "u", "two"), ("docker.io", "hub", "h")])).unwrap();
    until(&installation, "r.test", "two").await;

    let broken = async {
        while metric(&metrics, "credentials_file_broken") != "1" {
            assert_eq!(password(&installation, "r.test").await.as_deref(), Some("two"));
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    fs::write(&path, r#"{"auths": {"r.test": {"auth": "s3cret"}}}"#).unwrap();
    tokio::time::timeout(Duration::from_secs(30), broken).await.unwrap();
    assert_eq!(password(&installation, "r.test").await.as_deref(), Some("two"));

    fs::write(&path, logins(&[("r.test", "u", "three")])).unwrap();
    until(&installation, "r.test", "three").await;
    assert_eq!(metric(&metrics, "credentials_file_broken"), "0");
    assert_eq!(password(&installation, "docker.io").await, None);
}

/// As Kubernetes does it: the file is a link to one in `..data`, which is a link that is renamed over the old one.
#[tokio::test]
async fn a_mounted_secret_is_followed_when_its_link_is_swapped() {
    let folder = TempDir::new().unwrap();
    let at = |name: &str| folder.path().join(name);
    for (version, secret) in [("..1", "one"), ("..2", "two")] {
        fs::create_dir(at(version)).unwrap();
        fs::write(at(version).join("config.json"), logins(&[("r.test", "u", secret)])).unwrap();
    }
    symlink("..1", at("..data")).unwrap();
    symlink("..data/config.json", at("config.json")).unwrap();
    let (installation, _) = open(&of(&at("config.json"))).await;
    assert_eq!(password(&installation, "r.test").await.as_deref(), Some("one"));
    symlink("..2", at("..data_tmp")).unwrap();
    fs::rename(at("..data_tmp"), at("..data")).unwrap();
    fs::remove_dir_all(at("..1")).unwrap();
    until(&installation, "r.test", "two").await;
}

#[tokio::test]
async fn a_file_that_is_wrong_or_not_there_at_the_start_is_named() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("config.json");
    let error = |installation: Result<Installation, String>| installation.err().unwrap();
    let missing = error(Installation::open(&of(&path), &mut Default::default()).await);
    fs::write(&path, r#"{"credsStore": "../sh"}"#).unwrap();
    let wrong = error(Installation::open(&of(&path), &mut Default::default()).await);
    let begins = format!("docker_config: {}: ", path.display());
    assert!(missing.starts_with(&begins) && missing.contains("No such file"), "{missing}");
    assert!(wrong.starts_with(&begins) && wrong.contains("credsStore"), "{wrong}");
}
