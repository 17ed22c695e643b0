//! Manifests and indexes, of OCI and of Docker, and the choice of a platform.

use bytes::Bytes;
use kiln_domain::platform::Platform;
use kiln_domain::reference::Digest;
use oci_spec::image::{Descriptor, Platform as Named};
use serde::Deserialize;

pub(crate) const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub(crate) const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub(crate) const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
pub(crate) const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";

/// What is understood, for `Accept`.
pub(crate) const ACCEPTED: &str = "application/vnd.oci.image.index.v1+json, \
     application/vnd.docker.distribution.manifest.list.v2+json, \
     application/vnd.oci.image.manifest.v1+json, \
     application/vnd.docker.distribution.manifest.v2+json";

/// A manifest as it was read: the bytes are what its digest is of.
#[derive(Clone, Debug)]
pub(crate) struct Manifest {
    pub(crate) digest: Digest,
    pub(crate) media_type: String,
    pub(crate) bytes: Bytes,
    pub(crate) content: Content,
}

#[derive(Clone, Debug)]
pub(crate) enum Content {
    Image { config: Box<Descriptor>, layers: Vec<Descriptor> },
    Index(Vec<Descriptor>),
}

/// Why bytes are no manifest.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Flaw {
    Broken(String),
    Unsupported(String),
}

/// The fields of all four kinds, so that one reading tells them apart.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Document {
    schema_version: Option<u32>,
    media_type: Option<String>,
    config: Option<Descriptor>,
    layers: Option<Vec<Descriptor>>,
    manifests: Option<Vec<Descriptor>>,
}

impl Manifest {
    /// `content_type` is the answer's; what the document says of itself goes before it, as it is in the digest.
    pub(crate) fn parse(bytes: Bytes, content_type: Option<&str>) -> Result<Self, Flaw> {
        let broken = |problem: String| Flaw::Broken(format!("its manifest {problem}"));
        let document: Document =
            serde_json::from_slice(&bytes).map_err(|error| broken(format!("cannot be read: {error}")))?;
        if document.schema_version == Some(1) {
            let problem = "its manifest is of Docker's schema 1, out of use since 2017; push it again with a current tool";
            return Err(Flaw::Unsupported(problem.into()));
        }
        let content = match (document.manifests, document.config, document.layers) {
            (Some(manifests), None, None) => Content::Index(manifests),
            (None, Some(config), Some(layers)) => Content::Image { config: Box::new(config), layers },
            _ => return Err(broken("is neither that of an image nor an index".into())),
        };
        let (known, default) = match content {
            Content::Index(_) => ([OCI_INDEX, DOCKER_LIST], OCI_INDEX),
            Content::Image { .. } => ([OCI_MANIFEST, DOCKER_MANIFEST], OCI_MANIFEST),
        };
        let media_type = match document.media_type {
            Some(own) if known.contains(&own.as_str()) => own,
            Some(_) => return Err(broken("does not contain what its media type says".into())),
            None => {
                // Parameters (`; charset=…`) are no part of the type.
                let header = content_type.and_then(|text| text.split(';').next()).map(str::trim);
                header.filter(|text| known.contains(text)).unwrap_or(default).to_owned()
            }
        };
        Ok(Self { digest: Digest::of(&bytes), media_type, bytes, content })
    }
}

/// What an index has for a platform.
#[derive(Debug)]
pub(crate) enum Choice<'a> {
    Found(&'a Descriptor),
    /// Nothing that is named so: what it has, and those entries that don't say what they are for.
    Other {
        offered: Vec<String>,
        unnamed: Vec<&'a Descriptor>,
    },
}

/// The entries of an index that are images, by what they are for.
pub(crate) fn platforms(entries: &[Descriptor]) -> impl Iterator<Item = (&Descriptor, Platform)> {
    let named = entries.iter().filter_map(|entry| Some((entry, normal(entry.platform().as_ref()?))));
    // Attestations are entries too, for unknown/unknown.
    named.filter(|(_, platform)| platform.os != "unknown")
}

/// Chooses as containerd does, but for this: who asks for no variant gets the base one, or else the first there is.
pub(crate) fn choose<'a>(entries: &'a [Descriptor], platform: &Platform) -> Choice<'a> {
    let named = |entry: &'a Descriptor| entry.platform().as_ref().map(|named| (entry, normal(named)));
    let fitting: Vec<_> =
        entries.iter().filter_map(named).filter(|(_, named)| fits(named, platform)).collect();
    let base = fitting.iter().find(|(_, named)| named.variant.is_none());
    if let Some((entry, _)) = base.or(fitting.first()) {
        return Choice::Found(entry);
    }
    // Attestations are entries too, for unknown/unknown.
    let offered = entries.iter().filter_map(named).map(|(_, named)| named.to_string());
    Choice::Other {
        offered: offered.filter(|named| named != "unknown/unknown").collect(),
        unnamed: entries.iter().filter(|entry| entry.platform().is_none()).collect(),
    }
}

/// The platform that an image's config names; `None` if it names none.
pub(crate) fn platform_of_config(config: &[u8]) -> Option<Platform> {
    let named: Named = serde_json::from_slice(config).ok()?;
    let platform = normal(&named);
    (!platform.os.is_empty() && !platform.architecture.is_empty()).then_some(platform)
}

/// Whether an image for the platform `named` is one for the platform `asked` for.
pub(crate) fn fits(named: &Platform, asked: &Platform) -> bool {
    let variant = base_variant(&asked.architecture, asked.variant.as_deref());
    let any = asked.variant.is_none();
    named.os == asked.os
        && named.architecture == asked.architecture
        && (any || named.variant.as_deref() == variant)
}

fn normal(named: &Named) -> Platform {
    let architecture = named.architecture().to_string();
    let variant = base_variant(&architecture, named.variant().as_deref()).map(str::to_owned);
    Platform { os: named.os().to_string(), architecture, variant }
}

/// A variant that is an architecture's own name for its base is none (containerd's `platforms.Normalize`).
fn base_variant<'a>(architecture: &str, variant: Option<&'a str>) -> Option<&'a str> {
    match (architecture, variant) {
        (_, Some("")) | ("arm64", Some("v8" | "8")) | ("amd64", Some("v1")) | ("arm", Some("v7" | "7")) => {
            None
        }
        (_, other) => other,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn entries(platforms: &[&str]) -> Vec<Descriptor> {
        let entry = |(index, text): (usize, &&str)| {
            let digest = Digest::of(&index.to_be_bytes());
            let mut parts = text.split('/');
            let mut entry = json!({"mediaType": OCI_MANIFEST, "digest": digest, "size": index});
            if !text.is_empty() {
                entry["platform"] =
                    json!({"os": parts.next(), "architecture": parts.next(), "variant": parts.next()});
            }
            serde_json::from_value(entry).unwrap()
        };
        platforms.iter().enumerate().map(entry).collect()
    }

    #[test]
    fn a_platform_is_chosen() {
        let have = [
            "unknown/unknown",
            "linux/amd64/v3",
            "linux/amd64",
            "linux/arm/v6",
            "linux/arm/v7",
            "linux/arm64/v8",
            "linux/arm64/v9",
            "windows/amd64",
            "linux/riscv64/x",
            "linux/386",
        ];
        let entries = entries(&have);
        for (asked, expected) in [
            ("linux/amd64", Some("linux/amd64")),
            ("linux/amd64/v3", Some("linux/amd64/v3")),
            ("linux/amd64/v1", Some("linux/amd64")),
            ("linux/amd64/v2", None),
            ("linux/arm", Some("linux/arm/v7")),
            ("linux/arm/v6", Some("linux/arm/v6")),
            ("linux/arm64", Some("linux/arm64/v8")),
            ("linux/arm64/v8", Some("linux/arm64/v8")),
            ("linux/riscv64", Some("linux/riscv64/x")),
            ("linux/386", Some("linux/386")),
            ("windows/amd64", Some("windows/amd64")),
            ("linux/s390x", None),
        ] {
            let chosen = match choose(&entries, &asked.parse().unwrap()) {
                Choice::Found(entry) => Some(have[usize::try_from(entry.size()).unwrap()]),
                Choice::Other { offered, .. } => {
                    assert_eq!(offered.len(), 9, "{offered:?}");
                    None
                }
            };
            assert_eq!(chosen, expected, "{asked}");
        }
    }

    #[test]
    fn what_is_no_manifest_is_refused() {
        for (text, expected) in [
            (r#"{"schemaVersion":1,"fsLayers":[]}"#, "schema 1"),
            ("", "cannot be read"),
            ("[1]", "cannot be read"),
            ("{}", "neither"),
            (r#"{"schemaVersion":2,"manifests":[],"layers":[]}"#, "neither"),
            (r#"{"schemaVersion":2,"manifests":[{"digest":"nonsense"}]}"#, "cannot be read"),
            (
                r#"{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","manifests":[]}"#,
                "media type",
            ),
        ] {
            let flaw = Manifest::parse(Bytes::from_static(text.as_bytes()), None).unwrap_err();
            let (Flaw::Broken(problem) | Flaw::Unsupported(problem)) = flaw;
            assert!(problem.contains(expected), "{text}: {problem}");
        }
    }

    #[test]
    fn the_media_type_is_the_documents_own_or_the_answers() {
        let index = |own: &str, header| {
            let text = format!(r#"{{"schemaVersion":2,{own}"manifests":[]}}"#);
            Manifest::parse(Bytes::from(text), header).unwrap().media_type
        };
        let own = format!(r#""mediaType":"{DOCKER_LIST}","#);
        assert_eq!(index(&own, Some(OCI_INDEX)), DOCKER_LIST);
        let header = format!("{DOCKER_LIST}; charset=utf-8");
        assert_eq!(index("", Some(&header)), DOCKER_LIST);
        assert_eq!(index("", Some("text/plain")), OCI_INDEX);
    }

    #[test]
    fn a_configs_platform() {
        assert_eq!(
            platform_of_config(br#"{"os":"linux","architecture":"arm64","variant":"v8","x":1}"#),
            "linux/arm64".parse().ok()
        );
        for none in ["{}", "no", r#"{"os":"","architecture":""}"#, r#"{"os":"linux"}"#] {
            assert_eq!(platform_of_config(none.as_bytes()), None, "{none}");
        }
    }
}
