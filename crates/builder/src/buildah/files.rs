//! The files that buildah reads instead of the host's.

use std::collections::BTreeSet;
use std::io;
use std::os::unix::fs::symlink;
use std::path::Path;

use kiln_domain::registries::Registries;
use serde_json::json;

use crate::tool::Ways;

/// Any image may be used: signatures are not this file's business.
pub(super) const POLICY: &str = r#"{"default":[{"type":"insecureAcceptAnything"}]}"#;

/// containers-registries.conf(5): short names are Docker Hub's, as Docker has it; mirrors, and who is spoken to in plain HTTP.
pub(super) fn registries(ways: &Ways<'_>) -> String {
    let mut text =
        "unqualified-search-registries = [\"docker.io\"]\nshort-name-mode = \"disabled\"\n".to_owned();
    let at_hand: BTreeSet<&str> = ways.pulled_from.iter().copied().chain([ways.pushed_to]).collect();
    let mut say = |table: &str, location: &str| {
        let host = location.split('/').next().unwrap_or(location);
        let insecure = ways.registries.is_plain(host);
        // A JSON string is a TOML string.
        text.push_str(&format!("[[{table}]]\nlocation = {}\ninsecure = {insecure}\n", json!(location)));
    };
    for registry in at_hand {
        say("registry", registry);
        let mirrors = ways.registries.reach(registry).map(|reach| reach.mirrors.as_slice());
        for mirror in mirrors.unwrap_or_default() {
            say("registry.mirror", mirror);
        }
    }
    text
}

/// containers-certs.d(5): whom a registry is trusted by, and what is shown to it. The files themselves stay where they are.
pub(super) fn trust(folder: &Path, registries: &Registries, registry: &str) -> io::Result<()> {
    let Some(reach) = registries.reach(registry) else { return Ok(()) };
    let client = reach.client_certificate.as_ref();
    let files = [
        ("ca.crt", reach.ca.as_ref()),
        ("client.cert", client.map(|client| &client.certificate)),
        ("client.key", client.map(|client| &client.key)),
    ];
    for (name, path) in files.into_iter().filter_map(|(name, path)| Some((name, path?))) {
        let folder = folder.join(registry);
        std::fs::create_dir_all(&folder)?;
        match symlink(path, folder.join(name)) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_of_the_registries_at_hand() {
        let registries: Registries = serde_json::from_str(
            r#"{"docker.io": {"mirrors": ["m.test/hub", "127.0.0.1:5000"]}, "m.test": {"plain_http": true},
                "other.test": {"plain_http": true}}"#,
        )
        .unwrap();
        let pulled_from = ["docker.io", "m.test"].into();
        let ways = Ways { registries: &registries, pulled_from, pushed_to: "push.test:5000" };
        let told = super::registries(&ways);
        let (_, told) = told.split_once("short-name-mode = \"disabled\"\n").unwrap();
        assert_eq!(
            told,
            "[[registry]]\nlocation = \"docker.io\"\ninsecure = false\n\
             [[registry.mirror]]\nlocation = \"m.test/hub\"\ninsecure = true\n\
             [[registry.mirror]]\nlocation = \"127.0.0.1:5000\"\ninsecure = true\n\
             [[registry]]\nlocation = \"m.test\"\ninsecure = true\n\
             [[registry]]\nlocation = \"push.test:5000\"\ninsecure = false\n"
        );
    }
}
