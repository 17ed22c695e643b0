//! How registries are reached: over which mirrors, and whom their certificates are to be trusted by. It holds no secret, only
//! the paths of files that may.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::reference::ImageReference;

/// What an installation says of registries, each by `host[:port]` as a reference names it. A host without a port stands for
/// all its ports that are not named.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Registries(BTreeMap<String, Reach>);

/// How one registry is reached.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Reach {
    /// Who is asked before it for what is pulled, in this order: `host[:port][/path]`, each reached as its own entry says.
    pub mirrors: Vec<String>,
    /// Whether it is spoken to without TLS. Not said: loopback is, unless it has a CA or a client certificate.
    pub plain_http: Option<bool>,
    /// Certificates (PEM) of who may have signed its own, beside those that the system trusts.
    pub ca: Option<PathBuf>,
    /// What is shown to it of ourselves.
    pub client_certificate: Option<ClientCertificate>,
}

/// PEM files of a certificate and its key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClientCertificate {
    pub certificate: PathBuf,
    pub key: PathBuf,
}

impl Registries {
    /// What is said of a registry.
    pub fn reach(&self, registry: &str) -> Option<&Reach> {
        self.0.get(registry).or_else(|| self.0.get(without_port(registry)))
    }

    /// An image where its registry's mirrors have it, in the order in which they are to be asked before that registry.
    pub fn mirrored(&self, reference: &ImageReference) -> Vec<ImageReference> {
        let mirrors = self.reach(reference.registry()).map(|reach| reach.mirrors.as_slice());
        mirrors.unwrap_or_default().iter().filter_map(|mirror| reference.at(mirror).ok()).collect()
    }

    /// The registries (`host[:port]`) of a registry's mirrors.
    pub fn mirrors<'a>(&'a self, registry: &str) -> impl Iterator<Item = &'a str> {
        let mirrors = self.reach(registry).map(|reach| reach.mirrors.as_slice());
        mirrors.unwrap_or_default().iter().map(|mirror| host(mirror))
    }

    /// These are spoken to without TLS, unless something else is said of them.
    pub fn plain(&mut self, registries: impl IntoIterator<Item = String>) {
        for registry in registries {
            self.0.entry(registry).or_default().plain_http.get_or_insert(true);
        }
    }

    /// Whether a registry is spoken to without TLS.
    pub fn is_plain(&self, registry: &str) -> bool {
        let reach = self.reach(registry);
        let says_so = reach.and_then(|reach| reach.plain_http);
        let has_tls = reach.is_some_and(|reach| reach.ca.is_some() || reach.client_certificate.is_some());
        says_so.unwrap_or(!has_tls && is_loopback(registry))
    }

    pub fn iter(&self) -> impl Iterator<Item = (&str, &Reach)> {
        self.0.iter().map(|(registry, reach)| (registry.as_str(), reach))
    }

    /// What is wrong, each by its key.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        for (registry, reach) in &self.0 {
            if !is_location(registry) || registry.contains('/') {
                problems.push(format!("{registry}: must be HOST or HOST:PORT, as a reference names it"));
            }
            let mut wrong = |key: &str, what: &str| problems.push(format!("{registry}.{key}: {what}"));
            for mirror in &reach.mirrors {
                if !is_location(mirror) {
                    wrong("mirrors", &format!("`{mirror}` must be HOST[:PORT][/PATH], without a scheme"));
                } else if host(mirror) == registry {
                    wrong("mirrors", "a registry is no mirror of itself");
                }
            }
            let tls = reach.ca.is_some() || reach.client_certificate.is_some();
            if tls && reach.plain_http == Some(true) {
                wrong("plain_http", "stands beside a CA or a client certificate, which are for TLS");
            }
            let client = reach.client_certificate.as_ref();
            let files = reach.ca.iter().chain(client.map(|client| &client.certificate));
            for file in files.chain(client.map(|client| &client.key)).filter(|file| !file.is_absolute()) {
                wrong("ca", &format!("{} must be an absolute path", file.display()));
            }
        }
        problems
    }
}

impl FromIterator<(String, Reach)> for Registries {
    fn from_iter<T: IntoIterator<Item = (String, Reach)>>(registries: T) -> Self {
        Self(registries.into_iter().collect())
    }
}

fn host(location: &str) -> &str {
    location.split('/').next().unwrap_or(location)
}

fn without_port(registry: &str) -> &str {
    match registry.rsplit_once(':') {
        // Not within an IPv6 address's brackets.
        Some((host, port)) if port.bytes().all(|b| b.is_ascii_digit()) => host,
        _ => registry,
    }
}

/// 127.0.0.0/8, `localhost` and `[::1]`, with or without a port.
fn is_loopback(registry: &str) -> bool {
    let host = without_port(registry);
    let address = host.trim_start_matches('[').trim_end_matches(']').parse::<core::net::IpAddr>();
    host == "localhost" || address.is_ok_and(|address| address.is_loopback())
}

/// Whether references may begin so: then what follows the host is their path.
fn is_location(location: &str) -> bool {
    let parsed = format!("{location}/x").parse::<ImageReference>();
    parsed.is_ok_and(|reference| reference.registry() == host(location))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registries(text: &str) -> Registries {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn a_mirror_has_the_whole_name_and_comes_first() {
        let registries = registries(
            r#"{"docker.io": {"mirrors": ["m.test/hub", "127.0.0.1:5000"]}, "r.test": {"mirrors": ["docker.io"]}}"#,
        );
        let digest = format!("sha256:{}", "0".repeat(64));
        let pinned = format!("r.test:5000/a/b@{digest}");
        for (reference, expected) in [
            (
                "ubuntu",
                vec![
                    "m.test/hub/library/ubuntu:latest",
                    "127.0.0.1:5000/library/ubuntu:latest",
                    "docker.io/library/ubuntu:latest",
                ],
            ),
            (&pinned, vec![&format!("docker.io/a/b@{digest}"), &pinned]),
            ("other.test/a:1", vec!["other.test/a:1"]),
        ] {
            let reference: ImageReference = reference.parse().unwrap();
            let mirrored = registries.mirrored(&reference);
            // After them its own place is asked.
            let places = mirrored.iter().chain([&reference]).map(ToString::to_string);
            assert_eq!(places.collect::<Vec<_>>(), expected);
        }
        assert_eq!(registries.mirrors("docker.io").collect::<Vec<_>>(), ["m.test", "127.0.0.1:5000"]);
    }

    #[test]
    fn loopback_is_plain_unless_something_else_is_said() {
        let mut registries = registries(
            r#"{"127.0.0.1:1": {"ca": "/ca"}, "127.0.0.1:2": {"plain_http": false}, "p.test": {"plain_http": true},
                "p.test:443": {}, "t.test": {"plain_http": false}}"#,
        );
        registries.plain(["t.test".into(), "n.test:5000".into()]);
        for (registry, plain) in [
            ("127.0.0.1:1", false),
            ("127.0.0.1:2", false),
            ("127.0.0.1:3", true),
            ("127.9.9.9", true),
            ("localhost:5000", true),
            ("[::1]", true),
            ("[::1]:5000", true),
            ("localhost.evil.test", false),
            ("p.test:80", true),
            ("p.test:443", false),
            ("t.test", false),
            ("n.test:5000", true),
            ("n.test", false),
            ("docker.io", false),
        ] {
            assert_eq!(registries.is_plain(registry), plain, "{registry}");
        }
    }

    #[test]
    fn problems_name_the_registry_and_the_key() {
        for (text, problem) in [
            (r#"{"r.test": {"mirrors": ["https://m.test"]}}"#, "r.test.mirrors: `https://m.test` must be"),
            (r#"{"r.test": {"mirrors": ["mirror"]}}"#, "r.test.mirrors: `mirror` must be"),
            (r#"{"r.test": {"mirrors": ["r.test/x"]}}"#, "r.test.mirrors: a registry is no mirror of itself"),
            (r#"{"registry-1.docker.io": {}}"#, "registry-1.docker.io: must be HOST"),
            (r#"{"r.test/x": {}}"#, "r.test/x: must be HOST"),
            (r#"{"r.test": {"ca": "/ca", "plain_http": true}}"#, "r.test.plain_http: stands beside"),
            (r#"{"r.test": {"ca": "ca"}}"#, "r.test.ca: ca must be an absolute path"),
        ] {
            let problems = registries(text).problems();
            assert!(problems.len() == 1 && problems[0].starts_with(problem), "{problems:?}");
        }
        let right = r#"{"docker.io": {"mirrors": ["m.test:1/a/b"]}, "r.test:5000": {"ca": "/ca", "plain_http": false,
            "client_certificate": {"certificate": "/c", "key": "/k"}}, "localhost": {}}"#;
        assert_eq!(registries(right).problems(), Vec::<String>::new());
    }
}
