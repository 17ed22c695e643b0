//! What a build tool's words say of a registry: the tools are written in Go, and their libraries' words are the same.

/// What kept a build tool from a registry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RegistryError {
    Missing,
    Denied,
    Refused,
    Unavailable,
}

impl RegistryError {
    /// As the tool's words tell; none where they are of something else.
    pub(crate) fn told_by(error: &str) -> Option<Self> {
        let error = error.to_lowercase();
        let any = |texts: &[&str]| texts.iter().any(|text| error.contains(text));
        if any(&["manifest unknown", "name unknown", "repository name not known"]) {
            Some(Self::Missing)
        } else if any(&[
            "unauthorized",
            "denied",
            "authentication required",
            "invalid username/password",
            "forbidden",
            "authorization failed",
            "insufficient_scope",
        ]) {
            Some(Self::Denied)
        } else if any(&["connect: connection refused"]) {
            Some(Self::Refused)
        } else if any(&[
            "pinging container registry",
            "toomanyrequests",
            "too many requests",
            "no such host",
            "i/o timeout",
            "deadline exceeded",
            "connection reset",
            "unexpected eof",
            "received unexpected http status: 5",
            ": 500 internal server error",
            ": 502 bad gateway",
            ": 503 service unavailable",
            ": 504 gateway time",
            "x509:",
            "tls:",
        ]) {
            Some(Self::Unavailable)
        } else {
            None
        }
    }
}

/// The registry that an error of the transport is about: `pinging container registry HOST: …`, or `Get "https://HOST/…`.
pub(crate) fn asked(error: &str) -> Option<&str> {
    let pinged = error.split_once("pinging container registry ").and_then(|(_, rest)| rest.split_once(": "));
    let url = || {
        let (_, rest) = error.split_once("\"http://").or_else(|| error.split_once("\"https://"))?;
        rest.split(['/', '"']).next()
    };
    pinged.map(|(host, _)| host).or_else(url).filter(|host| !host.is_empty())
}
