//! A run's secrets as the files that build tools read: in the run's work folder, readable by their owner only.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use kiln_domain::failure::{Failure, FailureReason};
use kiln_registry::TOKEN_USER;
use secrecy::{ExposeSecret, SecretString};
use serde_json::json;

use crate::folder::write_private;

/// Under which Docker keeps the credentials for Docker Hub.
const HUB_KEY: &str = "https://index.docker.io/v1/";
/// Of the names of files with a build's secrets.
const PREFIX: &str = "secret-";
const HUB_NAMES: [&str; 3] = ["docker.io", "index.docker.io", "registry-1.docker.io"];

/// Docker's `config.json` (and so containers-auth.json(5)): one entry for each host that the build may use, no other.
pub(crate) fn registry_logins(registries: &BTreeMap<String, SecretString>) -> String {
    let mut entries = serde_json::Map::new();
    for (host, secret) in registries {
        let encode = |text: &str| base64::engine::general_purpose::STANDARD.encode(text);
        let login = secret.expose_secret();
        let entry = match login.split_once(':') {
            // Without a user name, such an entry is passed over.
            Some((TOKEN_USER, token)) => json!({"auth": encode("<token>:"), "identitytoken": token}),
            _ => json!({"auth": encode(login)}),
        };
        if HUB_NAMES.contains(&host.as_str()) {
            entries.insert(HUB_KEY.to_owned(), entry.clone());
        }
        entries.insert(host.clone(), entry);
    }
    json!({"auths": entries}).to_string()
}

/// Writes what `RUN --mount=type=secret` may ask for: id → file.
pub(crate) fn mounts(
    secrets: &BTreeMap<String, SecretString>,
    work: &Path,
) -> Result<BTreeMap<String, PathBuf>, Failure> {
    secrets.iter().map(|(id, content)| Ok((id.clone(), mount(id, content, work)?))).collect()
}

/// Removes what [`mounts`] wrote.
pub(crate) fn remove(work: &Path) -> std::io::Result<()> {
    for entry in std::fs::read_dir(work)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(PREFIX) {
            std::fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

fn mount(id: &str, content: &SecretString, work: &Path) -> Result<PathBuf, Failure> {
    let refuse = |problem: String| Failure::new(FailureReason::Internal, format!("secret `{id}` {problem}"));
    if id.is_empty() || !id.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b)) {
        return Err(refuse("has an id that is not letters, digits, '_', '.' and '-'".into()));
    }
    let bytes = base64::engine::general_purpose::STANDARD.decode(content.expose_secret());
    let bytes = bytes.map_err(|_| refuse("is not base64".into()))?;
    let file = work.join(format!("{PREFIX}{id}"));
    write_private(&file, &bytes).map_err(|error| refuse(format!("cannot be written: {error}")))?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn docker_hub_is_found_by_each_of_its_names() {
        let logins = registry_logins(&BTreeMap::from([
            ("docker.io".to_owned(), SecretString::from("a:b")),
            ("h:5000".to_owned(), "c:d".into()),
        ]));
        let logins: serde_json::Value = serde_json::from_str(&logins).unwrap();
        let hosts: Vec<_> = logins["auths"].as_object().unwrap().keys().collect();
        assert_eq!(hosts, ["docker.io", "h:5000", HUB_KEY]);
        assert_eq!(logins["auths"][HUB_KEY]["auth"], "YTpi");
    }
}
