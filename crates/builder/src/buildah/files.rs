//! The files that buildah reads instead of the host's.

use serde_json::json;

/// Any image may be used: signatures are not this file's business.
pub(super) const POLICY: &str = r#"{"default":[{"type":"insecureAcceptAnything"}]}"#;

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
