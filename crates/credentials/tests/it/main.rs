//! The credentials of an installation, from real files and real programs.

#![expect(
    clippy::unwrap_used,
    reason = "clippy takes only the tests themselves for tests, not what they share"
)]

mod file;
mod helper;
mod permission;

use std::path::Path;
use std::process::Command;

use kiln_credentials::{Config, Installation};
use kiln_registry::{Credential, Keychain};
use prometheus_client::registry::Registry as MetricsRegistry;

async fn open(config: &Config) -> (Installation, MetricsRegistry) {
    let mut metrics = MetricsRegistry::default();
    (Installation::open(config, &mut metrics).await.unwrap(), metrics)
}

/// A Docker config file of `username:password` logins.
fn logins(logins: &[(&str, &str, &str)]) -> String {
    let auths: serde_json::Map<_, _> = logins
        .iter()
        .map(|(registry, username, password)| {
            ((*registry).to_owned(), serde_json::json!({"username": username, "password": password}))
        })
        .collect();
    serde_json::json!({ "auths": auths }).to_string()
}

/// What `keychain` says: kind, user, secret.
async fn told(keychain: &impl Keychain, registry: &str) -> Option<[String; 3]> {
    let credential: Option<Credential> = keychain.credential(registry).await.unwrap();
    credential.map(|credential| credential.distinguishing().map(str::to_owned))
}

async fn password(keychain: &impl Keychain, registry: &str) -> Option<String> {
    told(keychain, registry).await.map(|[_, _, secret]| secret)
}

/// Makes an executable. By another process: a file that this one has open for writing can't be executed, and a child that
/// another test starts meanwhile would have it open, too.
fn script(path: &Path, text: &str) {
    let draft = path.with_extension("draft");
    std::fs::write(&draft, text).unwrap();
    let done = Command::new("install").args(["-m", "755"]).arg(&draft).arg(path).status().unwrap();
    assert!(done.success());
}

/// A metric's value.
fn metric(metrics: &MetricsRegistry, name: &str) -> String {
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, metrics).unwrap();
    let line = text.lines().find(|line| line.starts_with(name)).unwrap();
    line.rsplit(' ').next().unwrap().to_owned()
}
