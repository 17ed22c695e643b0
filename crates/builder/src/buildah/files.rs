//! The files that buildah reads instead of the host's.

use std::collections::BTreeMap;

use base64::Engine as _;
use kiln_registry::TOKEN_USER;
use secrecy::{ExposeSecret, SecretString};
use serde_json::json;

/// Any image may be used: signatures are not this file's business.
pub(super) const POLICY: &str = r#"{"default":[{"type":"insecureAcceptAnything"}]}"#;

/// containers-auth.json(5), one entry for each host.
pub(super) fn credentials(registries: &BTreeMap<String, SecretString>) -> String {
    let encode = |text: &str| base64::engine::general_purpose::STANDARD.encode(text);
    let entry = |(host, login): (&String, &SecretString)| {
        let login = login.expose_secret();
        let entry = match login.split_once(':') {
            // Without a user name, such an entry is passed over.
            Some((TOKEN_USER, token)) => json!({"auth": encode("<token>:"), "identitytoken": token}),
            _ => json!({"auth": encode(login)}),
        };
        (host.clone(), entry)
    };
    let entries: serde_json::Map<_, _> = registries.iter().map(entry).collect();
    json!({"auths": entries}).to_string()
}

/// containers-registries.conf(5): short names are Docker Hub's, as Docker has it; these hosts are spoken to in plain HTTP.
pub(super) fn registries(plain_http: &[String]) -> String {
    let mut text =
        "unqualified-search-registries = [\"docker.io\"]\nshort-name-mode = \"disabled\"\n".to_owned();
    for host in plain_http {
        // A JSON string is a TOML string.
        text.push_str(&format!("[[registry]]\nlocation = {}\ninsecure = true\n", json!(host)));
    }
    text
}
