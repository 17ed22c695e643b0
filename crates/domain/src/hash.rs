//! Which image a source makes: base and workspace references, computed as image-builder-mk3 computes them,
//! byte for byte, so that images that were built before are found again.
//!
//! What mk3's hash leaves out must not collide: each such field that is set adds a line of its own, sorted in:
//!
//! | native field | line |
//! |---|---|
//! | `build_args[NAME]` | `BuildArg.NAME: value` |
//! | `target` | `Target: value` |
//! | `platforms` | `Platforms: os/arch[/variant]` (none for the default) |
//!
//! Their values are escaped (`\` → `\\`, line feed → `\n`, carriage return → `\r`), so that no value can imitate a line.

use std::collections::BTreeMap;

use sha2::{Digest as _, Sha256};

use crate::platform::Platform;
use crate::source::DockerfileSource;

/// mk3's `workspaceBuildProcessVersion`.
const PROCESS_VERSION: u32 = 2;

/// `<repository>:<sha256 of the source's lines>`. `clone_target` is the commit for the native API; what it was
/// given for the compatible one.
pub fn base_ref(repository: &str, source: &DockerfileSource, clone_target: &str) -> String {
    let mut lines: BTreeMap<String, String> = BTreeMap::from([
        ("CloneTarget".into(), clone_target.to_owned()),
        ("ContextPath".into(), source.context_path.clone()),
        ("DockerfilePath".into(), source.path.clone()),
        ("DockerfileVersion".into(), source.version.clone()),
        ("RemoteURI".into(), source.remote_uri.clone()),
        ("Source".into(), "git".into()),
    ]);
    for (name, value) in &source.build_args {
        lines.insert(format!("BuildArg.{name}"), escaped(value));
    }
    if !source.target.is_empty() {
        lines.insert("Target".into(), escaped(&source.target));
    }
    let platforms = source.built_for();
    if platforms != [Platform::default()] {
        let platforms: Vec<_> = platforms.iter().map(Platform::to_string).collect();
        lines.insert("Platforms".into(), platforms.join(","));
    }
    for (key, set) in [("Provenance", source.provenance), ("Reproducible", source.reproducible)] {
        if set {
            lines.insert(key.into(), "true".into());
        }
    }
    let mut hash = Sha256::new();
    for (key, value) in &lines {
        hash.update(format!("{key}: {value}\n"));
    }
    hash.update("\n");
    format!("{repository}:{}", hex::encode(hash.finalize()))
}

/// `<repository>:<sha256 of the base reference and the process version>`: the target of a build.
pub fn workspace_ref(repository: &str, base_ref: &str) -> String {
    let hash = Sha256::digest(format!("{base_ref}\n{PROCESS_VERSION}\n"));
    format!("{repository}:{}", hex::encode(hash))
}

fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('\n', "\\n").replace('\r', "\\r")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn source() -> DockerfileSource {
        DockerfileSource {
            remote_uri: "https://github.com/foo/bar.git".into(),
            revision: "main".into(),
            path: "Dockerfile".into(),
            context_path: ".".into(),
            version: "abc".into(),
            build_args: BTreeMap::new(),
            target: String::new(),
            checkout_location: None,
            platform: None,
            platforms: Vec::new(),
            provenance: false,
            reproducible: false,
            unknown: BTreeMap::new(),
        }
    }

    /// Refs that image-builder-mk3 (4f45d02) was seen to compute.
    #[test]
    fn mk3_vectors() {
        let vectors: serde_json::Value =
            serde_json::from_str(include_str!("../tests/mk3-vectors.json")).unwrap();
        let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
        let refs = vectors["refs"].as_array().unwrap();
        assert_eq!(refs.len(), 10);
        for vector in refs {
            let (file, git) = (&vector["source"]["file"], &vector["source"]["file"]["source"]["git"]);
            let base = if file.is_object() {
                let source = DockerfileSource {
                    remote_uri: text(&git["remoteUri"]),
                    revision: text(&git["cloneTaget"]),
                    path: text(&file["dockerfilePath"]),
                    context_path: text(&file["contextPath"]),
                    version: text(&file["dockerfileVersion"]),
                    build_args: BTreeMap::new(),
                    target: String::new(),
                    checkout_location: None,
                    platform: None,
                    platforms: Vec::new(),
                    provenance: false,
                    reproducible: false,
                    unknown: BTreeMap::new(),
                };
                base_ref(&text(&vector["base_image_repository"]), &source, &source.revision)
            } else {
                let reference: crate::reference::ImageReference =
                    text(&vector["source"]["ref"]["ref"]).parse().unwrap();
                assert_eq!(vector["registry_asked_for"][0], reference.to_string());
                reference.pinned(&text(&vectors["the_only_digest"]).parse().unwrap()).to_string()
            };
            assert_eq!(vector["base_ref"], base, "{}", vector["name"]);
            let workspace = workspace_ref(&text(&vector["workspace_image_repository"]), &base);
            assert_eq!(vector["workspace_ref"], workspace, "{}", vector["name"]);
        }
        let upstream = workspace_ref("r", "source-image:latest");
        assert_eq!(upstream, "r:2b1325adbf901167f47a914a62d377c98f1e32e0837dafb95ca86ca9d08ab14e");
    }

    /// Vectors of the fields that mk3 did not have: they must never change either.
    #[test]
    fn native_fields() {
        let mut source = source();
        let plain = base_ref("registry/base", &source, "main");
        assert_eq!(plain, "registry/base:13339e654aad38508257f48b291b14217aa9f966f8d75e1c6ab3fd7507ddc8a4");
        for change in [
            |source: &mut DockerfileSource| source.provenance = true,
            |source: &mut DockerfileSource| source.reproducible = true,
            |source: &mut DockerfileSource| {
                source.platforms = vec![Platform::default(), "linux/arm64".parse().unwrap()];
            },
        ] {
            let mut other = source.clone();
            change(&mut other);
            assert_ne!(base_ref("registry/base", &other, "main"), plain);
        }
        source.platform = Some(Platform::default());
        assert_eq!(base_ref("registry/base", &source, "main"), plain, "the default platform is no field");
        source.build_args = BTreeMap::from([("B".into(), "x\ny".into()), ("A".into(), "1".into())]);
        source.target = "dev".into();
        let text = "BuildArg.A: 1\nBuildArg.B: x\\ny\nCloneTarget: main\nContextPath: .\nDockerfilePath: Dockerfile\n\
                    DockerfileVersion: abc\nRemoteURI: https://github.com/foo/bar.git\nSource: git\nTarget: dev\n\n";
        let expected = format!("registry/base:{}", hex::encode(Sha256::digest(text)));
        assert_eq!(base_ref("registry/base", &source, "main"), expected);
    }

    proptest! {
        #[test]
        fn different_args_make_different_images(
            a in proptest::collection::btree_map("[A-Z]{1,3}", "[a-z:\\\\\n\r ]{0,6}", 0..4),
            b in proptest::collection::btree_map("[A-Z]{1,3}", "[a-z:\\\\\n\r ]{0,6}", 0..4),
        ) {
            let of = |args: &BTreeMap<String, String>| {
                base_ref("r", &DockerfileSource { build_args: args.clone(), ..source() }, "main")
            };
            prop_assert_eq!(a == b, of(&a) == of(&b));
        }
    }
}
