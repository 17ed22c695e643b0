//! Image references and digests, as Docker writes them.

use std::fmt;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A parsed reference in Docker's normal form: `ubuntu` is `docker.io/library/ubuntu:latest`.
///
/// Grammar and normal form are those of <https://github.com/distribution/reference>, by way of oci-spec.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
pub struct ImageReference(#[schemars(with = "String")] oci_spec::distribution::Reference);

/// A text that Docker would refuse as an image reference.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("cannot parse image ref `{text}`: {problem}")]
pub struct InvalidReference {
    /// Cut to a length fit for a message.
    text: String,
    problem: String,
}

impl ImageReference {
    /// `host[:port]`; Docker Hub's is `docker.io`, by whichever of its names it was written.
    pub fn registry(&self) -> &str {
        self.0.registry()
    }

    pub fn repository(&self) -> &str {
        self.0.repository()
    }

    pub fn tag(&self) -> Option<&str> {
        self.0.tag()
    }

    pub fn digest(&self) -> Option<Digest> {
        self.0.digest().and_then(|digest| digest.parse().ok())
    }

    /// `registry/repository`, without tag and digest.
    pub fn name(&self) -> String {
        format!("{}/{}", self.registry(), self.repository())
    }

    /// `registry/repository@digest`, the tag trimmed.
    pub fn pinned(&self, digest: &Digest) -> Self {
        Self(self.0.clone_with_digest(digest.to_string()))
    }

    /// What a manifest is asked for by: the digest where there is one, else the tag.
    pub fn selector(&self) -> &str {
        self.0.digest().or(self.0.tag()).unwrap_or("latest")
    }
}

impl FromStr for ImageReference {
    type Err = InvalidReference;

    fn from_str(text: &str) -> Result<Self, InvalidReference> {
        let refuse = |problem: String| InvalidReference {
            text: crate::limits::truncated(text.to_owned(), 300),
            problem,
        };
        if text.len() > crate::limits::REFERENCE_BYTES {
            return Err(refuse(format!("longer than {} bytes", crate::limits::REFERENCE_BYTES)));
        }
        let (name, _) = text.split_once('@').unwrap_or((text, ""));
        if name.len() == 64 && name.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)) {
            return Err(refuse("64 hex digits are an image's id, not its name".into()));
        }
        let mut reference: oci_spec::distribution::Reference =
            text.parse().map_err(|error: oci_spec::distribution::ParseError| refuse(error.to_string()))?;
        if reference.repository().bytes().any(|b| b.is_ascii_uppercase()) {
            return Err(refuse("repository name must be lowercase".into()));
        }
        // Another of Docker Hub's names, which the parser leaves as it is.
        if reference.registry() == "registry-1.docker.io" {
            let path = reference.repository();
            let path = if path.contains('/') { path.to_owned() } else { format!("library/{path}") };
            let rest = reference.to_string();
            let rest =
                rest.strip_prefix(&format!("registry-1.docker.io/{}", reference.repository())).unwrap_or("");
            reference = format!("docker.io/{path}{rest}")
                .parse()
                .map_err(|error: oci_spec::distribution::ParseError| refuse(error.to_string()))?;
        }
        // Docker bounds the whole name, the host included.
        if reference.registry().len() + 1 + reference.repository().len() > 255 {
            return Err(refuse("repository name must not be more than 255 characters".into()));
        }
        Ok(Self(reference))
    }
}

impl fmt::Display for ImageReference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl TryFrom<String> for ImageReference {
    type Error = InvalidReference;
    fn try_from(text: String) -> Result<Self, InvalidReference> {
        text.parse()
    }
}

impl From<ImageReference> for String {
    fn from(reference: ImageReference) -> String {
        reference.to_string()
    }
}

/// `sha256:<64 lower-case hex digits>`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
pub struct Digest(String);

/// A text that is no sha256 digest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a digest: expected sha256:<64 hex digits>")]
pub struct InvalidDigest;

impl Digest {
    /// The digest of a content.
    pub fn of(content: &[u8]) -> Self {
        use sha2::Digest as _;
        Self(format!("sha256:{}", hex::encode(sha2::Sha256::digest(content))))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Digest {
    type Err = InvalidDigest;
    fn from_str(text: &str) -> Result<Self, InvalidDigest> {
        let digits = text.strip_prefix("sha256:").ok_or(InvalidDigest)?;
        let valid =
            digits.len() == 64 && digits.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        valid.then(|| Self(text.to_owned())).ok_or(InvalidDigest)
    }
}

impl TryFrom<String> for Digest {
    type Error = InvalidDigest;
    fn try_from(text: String) -> Result<Self, InvalidDigest> {
        text.parse()
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> String {
        digest.0
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn normal_forms() {
        for (written, normal) in [
            ("ubuntu", "docker.io/library/ubuntu:latest"),
            ("ubuntu:22.04", "docker.io/library/ubuntu:22.04"),
            ("gitpod/workspace-full", "docker.io/gitpod/workspace-full:latest"),
            ("index.docker.io/library/ubuntu:1", "docker.io/library/ubuntu:1"),
            ("registry-1.docker.io/ubuntu:1", "docker.io/library/ubuntu:1"),
            ("registry-1.docker.io/a/b", "docker.io/a/b:latest"),
            ("localhost/x", "localhost/x:latest"),
            ("127.0.0.1:5000/a/b/c:t", "127.0.0.1:5000/a/b/c:t"),
        ] {
            assert_eq!(written.parse::<ImageReference>().unwrap().to_string(), normal, "{written}");
        }
    }

    #[test]
    fn what_docker_refuses_is_refused_by_name() {
        let (long, hex) = ("a".repeat(300), "a".repeat(64));
        for (written, problem) in [
            ("", "at least one component"),
            ("UPPER/x", "must be lowercase"),
            ("a//b", "invalid reference format"),
            ("x:tag:tag", "invalid reference format"),
            ("https://x/y", "invalid reference format"),
            ("a b", "invalid reference format"),
            ("a\0b", "invalid reference format"),
            ("--help", "invalid reference format"),
            ("x@sha256:abc", "invalid reference format"),
            (&long, "not be more than 255"),
            (&hex, "an image's id"),
        ] {
            let error = written.parse::<ImageReference>().unwrap_err().to_string();
            assert!(error.contains(problem), "{written:?}: {error}");
        }
    }

    proptest! {
        #[test]
        fn what_is_printed_parses_to_the_same(
            text in "([a-z]{1,8}(\\.[a-z]{2,5})?(:[0-9]{2,4})?/)?[a-z0-9]{1,9}([._-][a-z0-9]{1,4})?(/[a-z0-9]{1,5}){0,2}(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,12})?(@sha256:[0-9a-f]{64})?"
        ) {
            if let Ok(reference) = text.parse::<ImageReference>() {
                prop_assert_eq!(reference.to_string().parse::<ImageReference>(), Ok(reference));
            }
        }

        #[test]
        fn no_text_panics(text in "\\PC{0,80}") {
            let _ = text.parse::<ImageReference>();
        }
    }
}
