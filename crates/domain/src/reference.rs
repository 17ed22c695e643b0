//! Image references and digests, as Docker writes them.

use std::fmt;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::id::is_hex;

/// A parsed reference in Docker's normal form: `ubuntu` is `docker.io/library/ubuntu:latest`.
///
/// Grammar and normal form are those of <https://github.com/distribution/reference>.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub struct ImageReference {
    registry: String,
    repository: String,
    tag: Option<String>,
    digest: Option<String>,
}

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
        &self.registry
    }

    pub fn repository(&self) -> &str {
        &self.repository
    }

    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    pub fn digest(&self) -> Option<Digest> {
        self.digest.as_ref().and_then(|digest| digest.parse().ok())
    }

    /// `registry/repository`, without tag and digest.
    pub fn name(&self) -> String {
        format!("{}/{}", self.registry, self.repository)
    }

    /// `registry/repository@digest`, the tag trimmed.
    pub fn pinned(&self, digest: &Digest) -> Self {
        Self { tag: None, digest: Some(digest.to_string()), ..self.clone() }
    }

    /// The same repository, tag and digest at another location, `host[:port][/path]`: where a mirror has it.
    pub fn at(&self, location: &str) -> Result<Self, InvalidReference> {
        let moved: Self = format!("{location}/{}", self.repository).parse()?;
        Ok(Self { tag: self.tag.clone(), digest: self.digest.clone(), ..moved })
    }

    /// What a manifest is asked for by: the digest where there is one, else the tag.
    pub fn selector(&self) -> &str {
        self.digest.as_deref().or(self.tag.as_deref()).unwrap_or(DEFAULT_TAG)
    }
}

const DEFAULT_TAG: &str = "latest";
const HUB: &str = "docker.io";
/// Docker Hub's further names.
const HUB_ALIASES: [&str; 2] = ["index.docker.io", "registry-1.docker.io"];
/// Docker bounds the whole name, the host included.
const NAME_BYTES: usize = 255;

impl FromStr for ImageReference {
    type Err = InvalidReference;

    fn from_str(text: &str) -> Result<Self, InvalidReference> {
        parse(text).map_err(|problem| InvalidReference {
            text: crate::limits::truncated(text.to_owned(), 300),
            problem: problem.to_owned(),
        })
    }
}

// By hand, as the specification's regular expression takes 40 ms to compile in each new process, every builder among them;
// a test compares the two.
fn parse(text: &str) -> Result<ImageReference, &'static str> {
    const FORMAT: &str = "invalid reference format";
    if text.is_empty() {
        return Err("repository name must have at least one component");
    }
    if text.len() > crate::limits::REFERENCE_BYTES {
        return Err("it is too long");
    }
    let (named, digest) = match text.split_once('@') {
        Some((named, digest)) => (named, Some(digest)),
        None => (text, None),
    };
    if named.len() == 64 && named.bytes().all(is_hex) {
        return Err("64 hex digits are an image's id, not its name");
    }
    // A colon after the last slash is the tag's; one before it is a port's.
    let last = named.rfind('/').map_or(0, |slash| slash + 1);
    let (name, tag) = match named.get(last..).and_then(|component| component.find(':')) {
        Some(colon) => named.split_at_checked(last + colon).ok_or(FORMAT)?,
        None => (named, ""),
    };
    let tag = if tag.is_empty() { None } else { Some(tag.strip_prefix(':').ok_or(FORMAT)?) };
    if tag.is_some_and(|tag| !is_tag(tag)) {
        return Err(FORMAT);
    }
    if let Some(digest) = digest {
        check_digest(digest)?;
    }
    let (registry, path) = match name.split_once('/') {
        Some((host, path)) if host.contains(['.', ':']) || host == "localhost" => (host, path),
        _ => (HUB, name),
    };
    // The expression also takes for a path's first component, `_` and all, what is then split off as a host.
    if registry != HUB && !is_host(registry) && !is_component(registry) {
        return Err(FORMAT);
    }
    if !path.split('/').all(is_component) {
        let lower = path.to_ascii_lowercase();
        return Err(if lower.split('/').all(is_component) {
            "repository name must be lowercase"
        } else {
            FORMAT
        });
    }
    let registry = if HUB_ALIASES.contains(&registry) { HUB } else { registry };
    let official = registry == HUB && !path.contains('/');
    let repository = if official { format!("library/{path}") } else { path.to_owned() };
    if registry.len() + 1 + repository.len() > NAME_BYTES {
        return Err("repository name must not be more than 255 characters");
    }
    let tag = tag.or(if digest.is_none() { Some(DEFAULT_TAG) } else { None });
    Ok(ImageReference {
        registry: registry.to_owned(),
        repository,
        tag: tag.map(ToOwned::to_owned),
        digest: digest.map(ToOwned::to_owned),
    })
}

/// `[a-zA-Z0-9_][a-zA-Z0-9_.-]{0,127}`
fn is_tag(tag: &str) -> bool {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    tag.len() <= 128
        && tag.bytes().next().is_some_and(word)
        && tag.bytes().all(|b| word(b) || b == b'.' || b == b'-')
}

/// Letters and digits, and between them `.`, `_`, `__` or any number of `-`.
fn is_component(component: &str) -> bool {
    let alphanumeric = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    let separator = |text: &str| matches!(text, "." | "_" | "__") || text.bytes().all(|b| b == b'-');
    component.starts_with(alphanumeric)
        && component.ends_with(alphanumeric)
        && component.split(alphanumeric).all(separator)
}

/// `host[:port]`, the host of letters, digits and inner `-` between dots.
fn is_host(registry: &str) -> bool {
    let (host, port) = registry.split_once(':').unwrap_or((registry, "0"));
    let label = |label: &str| {
        !label.is_empty()
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    host.split('.').all(label) && !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit())
}

fn check_digest(digest: &str) -> Result<(), &'static str> {
    let (algorithm, digits) = digest.split_once(':').ok_or("invalid reference format")?;
    if digits.len() < 32 || !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err("invalid reference format");
    }
    let expected = match algorithm {
        "sha256" => 64,
        "sha384" => 96,
        "sha512" => 128,
        _ => return Err("unsupported digest algorithm"),
    };
    if digits.len() == expected { Ok(()) } else { Err("invalid checksum digest length") }
}

impl fmt::Display for ImageReference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.repository)?;
        self.tag.as_ref().map_or(Ok(()), |tag| write!(f, ":{tag}"))?;
        self.digest.as_ref().map_or(Ok(()), |digest| write!(f, "@{digest}"))
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
            ("my_registry.lan/x", "my_registry.lan/x:latest"),
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

        /// oci-spec's parser is the regular expression of the specification's own implementation.
        #[test]
        fn what_the_specifications_expression_takes_is_taken(
            text in "([a-zA-Z0-9.-]{1,6}(:[0-9]{0,3})?/)?[a-z0-9A-Z._/-]{0,12}(:[A-Za-z0-9_.-]{0,6})?(@sha(256|512|1):[0-9a-fA-F]{30,64})?"
        ) {
            let theirs = text.parse::<oci_spec::distribution::Reference>().ok();
            let theirs = theirs.filter(|reference| !reference.repository().bytes().any(|b| b.is_ascii_uppercase()));
            let ours = text.parse::<ImageReference>().ok();
            prop_assert_eq!(ours.map(|r| r.to_string()), theirs.map(|r| r.to_string()), "{}", text);
        }

        #[test]
        fn no_text_panics(text in "\\PC{0,80}") {
            let _ = text.parse::<ImageReference>();
        }
    }
}
