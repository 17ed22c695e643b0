use std::fs;
use std::time::Duration;

use kiln_credentials::Config;
use kiln_registry::{Error, Keychain as _};
use tempfile::TempDir;

use crate::{metric, open, script, told};

/// A helper `fake` that remembers what it was asked, and answers as `body` says with the server in `$server`.
fn helped(folder: &TempDir, body: &str) -> Config {
    let at = |name: &str| folder.path().join(name);
    let asked = at("asked");
    let text = format!("#!/bin/sh\nread -r server\necho \"$1 $server\" >> {}\n{body}\n", asked.display());
    script(&at("docker-credential-fake"), &text);
    let config = serde_json::json!({
        "auths": {"r.test": {"username": "file", "password": "f"}},
        "credHelpers": {"r.test": "fake", "https://index.docker.io/v1/": "fake", "gone.test": "gone"},
    });
    fs::write(at("config.json"), config.to_string()).unwrap();
    Config {
        docker_config: Some(at("config.json")),
        helper_folders: vec![folder.path().to_owned()],
        helper_timeout_seconds: 2,
        ..Config::default()
    }
}

fn words(kind: &str, username: &str, secret: &str) -> Option<[String; 3]> {
    Some([kind, username, secret].map(str::to_owned))
}

#[tokio::test]
async fn a_helper_is_asked_by_the_name_that_docker_gives_and_only_for_its_registries() {
    let folder = TempDir::new().unwrap();
    let config =
        helped(&folder, r#"printf '{"ServerURL":"%s","Username":"u","Secret":"of %s"}' "$server" "$server""#);
    let (installation, _) = open(&config).await;
    for _ in 0..2 {
        assert_eq!(told(&installation, "r.test").await, words("password", "u", "of r.test"));
        let hub = words("password", "u", "of https://index.docker.io/v1/");
        assert_eq!(told(&installation, "docker.io").await, hub);
        assert_eq!(told(&installation, "other.test").await, None);
    }
    // Its answers are given again for a while.
    let asked = fs::read_to_string(folder.path().join("asked")).unwrap();
    assert_eq!(asked, "get r.test\nget https://index.docker.io/v1/\n");
}

#[tokio::test]
async fn a_token_of_a_helper_is_an_identity_token_and_without_one_the_file_counts() {
    let folder = TempDir::new().unwrap();
    let config = helped(&folder, r#"echo '{"ServerURL":"","Username":"<token>","Secret":"refresh"}'"#);
    let (installation, _) = open(&config).await;
    assert_eq!(told(&installation, "r.test").await, words("identity token", "", "refresh"));

    let config = helped(&folder, "echo 'credentials not found in native keychain'; exit 1");
    let (installation, _) = open(&config).await;
    assert_eq!(told(&installation, "r.test").await, words("password", "file", "f"));
}

#[tokio::test]
async fn a_helper_that_fails_floods_lies_or_hangs_is_told_of_without_its_words() {
    let folder = TempDir::new().unwrap();
    for (body, expected) in [
        ("echo s3cret; exit 1", "docker-credential-fake failed"),
        ("echo s3cret", "answers what is no login"),
        ("exec yes s3cret", "more than 64 KiB"),
        // What it starts would keep its output open.
        ("sleep 1000 & sleep 1000", "does not answer within 2s"),
    ] {
        let (installation, metrics) = open(&helped(&folder, body)).await;
        let asking = installation.credential("r.test");
        let error = tokio::time::timeout(Duration::from_secs(60), asking).await.unwrap().unwrap_err();
        assert!(matches!(error, Error::NoCredential { .. }) && !error.is_users());
        let text = error.to_string();
        assert!(text.contains(expected) && text.contains("r.test") && !text.contains("s3cret"), "{text}");
        assert_eq!(metric(&metrics, "credentials_failed_total{source=\"helper\"}"), "1");
    }
    let (installation, _) = open(&helped(&folder, "")).await;
    let error = installation.credential("gone.test").await.unwrap_err().to_string();
    assert!(error.contains("docker-credential-gone is in none of `helper_folders`"), "{error}");
}
