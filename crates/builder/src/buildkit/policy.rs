//! Which images a build may take from the daemon's store, as a source policy of BuildKit's.
//!
//! The daemon is shared: an image that is named by its digest it takes from its own store, whoever's credentials brought
//! it there. So each digest is asked for at its registry first, with the build's own credentials, and none else is admitted.
//! A tag is pinned to what it was found to be, so that what is recorded as the base is what is built on.

use kiln_domain::reference::{Digest, ImageReference};
use serde_json::{Value, json};

/// The policy for a build whose base images were found to be these.
pub(super) fn of(found: &[(ImageReference, Digest)]) -> Value {
    let rule =
        |action: &str, identifier: String| json!({"action": action, "selector": {"identifier": identifier}});
    let mut rules = vec![rule("DENY", "docker-image://*@sha256:*".into())];
    for (image, digest) in found {
        let tagged = image.tag().map_or_else(|| image.name(), |tag| format!("{}:{tag}", image.name()));
        rules.push(rule("ALLOW", format!("docker-image://{tagged}@{digest}")));
    }
    for (image, digest) in found.iter().filter(|(image, _)| image.digest().is_none()) {
        let mut pin = rule("CONVERT", format!("docker-image://{image}"));
        if let Some(pin) = pin.as_object_mut() {
            pin.insert("updates".into(), json!({"identifier": format!("docker-image://{image}@{digest}")}));
        }
        rules.push(pin);
    }
    json!({"version": 1, "rules": rules})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tag_is_pinned_and_other_digests_are_refused() {
        let digest = Digest::of(b"x");
        let found = |image: &str| (image.parse().unwrap(), digest.clone());
        let policy = of(&[found("h:5/x:1"), found(&format!("busybox@{digest}"))]);
        let rules = policy["rules"].as_array().unwrap();
        let told = |rule: &Value| {
            let words = [&rule["action"], &rule["selector"]["identifier"], &rule["updates"]["identifier"]];
            words.map(|word| word.as_str().unwrap_or_default().replace(digest.as_str(), "D")).join(" ")
        };
        let told: Vec<_> = rules.iter().map(told).collect();
        assert_eq!(
            told,
            [
                "DENY docker-image://*@sha256:* ",
                "ALLOW docker-image://h:5/x:1@D ",
                "ALLOW docker-image://docker.io/library/busybox@D ",
                "CONVERT docker-image://h:5/x:1 docker-image://h:5/x:1@D",
            ]
        );
    }
}
