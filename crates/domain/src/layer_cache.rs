//! Where in a registry the layers of builds are kept, for builds that meet a daemon without them.
//!
//! A reference of the cache is a tag that says whose layers it has: the first part is a hash of all that must be equal for a
//! build to read it, the second names the branch. Both are computed, never looked up.

use serde::{Deserialize, Serialize};

use crate::reference::{Digest, ImageReference, InvalidReference};
use crate::source::DockerfileSource;

/// How the layers of builds are kept in a registry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LayerCache {
    /// Whether builds begin with the layers of earlier ones, and leave theirs.
    pub enabled: bool,
    /// `host[:port]/name`. Without it, the base images' repository with `-cache` behind its name.
    pub repository: Option<String>,
    /// How long the registry may take to say whether it has layers for a build, which otherwise begins without.
    pub import_seconds: u64,
    /// How long a build's layers may take to be there, once its image is.
    pub export_seconds: u64,
}

impl Default for LayerCache {
    fn default() -> Self {
        Self { enabled: true, repository: None, import_seconds: 3, export_seconds: 600 }
    }
}

impl LayerCache {
    /// The repository of the installation whose base images are in `base`, an image's or a repository's name.
    pub fn repository(&self, base: &str) -> String {
        self.repository.clone().unwrap_or_else(|| format!("{base}-cache"))
    }

    /// What is wrong with it, each by its key.
    pub fn problems(&self) -> Vec<String> {
        let repository = self.repository.as_ref();
        let wrong = |name: &&String| {
            name.parse::<ImageReference>().ok().is_none_or(|reference| reference.name() != **name)
        };
        let mut problems = Vec::new();
        if repository.as_ref().is_some_and(wrong) {
            problems.push("repository: must be HOST[:PORT]/NAME, without a tag".to_owned());
        }
        for (key, seconds) in
            [("import_seconds", self.import_seconds), ("export_seconds", self.export_seconds)]
        {
            if seconds == 0 {
                problems.push(format!("{key}: must be at least 1"));
            }
        }
        problems
    }
}

/// The references that concern a build.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheRefs {
    /// Of its branch: read, and written after it.
    pub own: ImageReference,
    /// Of the default branch: read too. The same as `own` for a build of the remote's HEAD.
    pub default: ImageReference,
    /// The branch that was asked for by its name, which may be the default one.
    pub branch: Option<String>,
}

impl CacheRefs {
    /// `repository` as [`LayerCache::repository`] gives it. `owner`: who alone may read it, where the source or its build
    /// isn't anybody's to see.
    pub fn of(
        repository: &str,
        source: &DockerfileSource,
        owner: Option<&str>,
    ) -> Result<Self, InvalidReference> {
        let platforms: Vec<_> = source.built_for().iter().map(ToString::to_string).collect();
        // As JSON no part can be taken for two.
        let parts = serde_json::json!([source.remote_uri, source.dockerfile(), platforms, owner]);
        let key = shortened(&parts.to_string(), 32);
        let branch = branch(&source.revision);
        let of = |branch: &str| format!("{repository}:{key}-{branch}").parse::<ImageReference>();
        let default = of("default")?;
        let own = match branch {
            Branch::Head => default.clone(),
            Branch::None => of("commits")?,
            Branch::Named(name) => of(&shortened(name, 16))?,
        };
        let branch = if let Branch::Named(name) = branch { Some(name.to_owned()) } else { None };
        Ok(Self { own, default, branch })
    }
}

enum Branch<'a> {
    Head,
    Named(&'a str),
    /// A commit by itself is of no branch: all such builds share what they leave.
    None,
}

fn branch(revision: &str) -> Branch<'_> {
    let name = revision.strip_prefix("refs/heads/").unwrap_or(revision);
    let is_commit = matches!(name.len(), 40 | 64) && name.bytes().all(|b| b.is_ascii_hexdigit());
    match name {
        "" | "HEAD" => Branch::Head,
        _ if is_commit => Branch::None,
        name => Branch::Named(name),
    }
}

/// The first digits of a text's hash.
fn shortened(text: &str, digits: usize) -> String {
    Digest::of(text.as_bytes()).as_str().trim_start_matches("sha256:").chars().take(digits).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refs(change: impl FnOnce(&mut DockerfileSource), owner: Option<&str>) -> CacheRefs {
        let mut source = DockerfileSource { remote_uri: "https://h/x".into(), ..Default::default() };
        change(&mut source);
        CacheRefs::of("r.test/base-cache", &source, owner).unwrap()
    }

    #[test]
    fn what_tells_two_caches_apart() {
        let plain = refs(|_| {}, None);
        assert_eq!(plain.own, plain.default);
        assert_eq!(plain.own.name(), "r.test/base-cache");
        let others = [
            refs(|source| source.remote_uri = "https://h/y".into(), None),
            refs(|source| source.path = "y/Dockerfile".into(), None),
            refs(|source| source.platform = Some("linux/arm64".parse().unwrap()), None),
            refs(|_| {}, Some("ann")),
            refs(|_| {}, Some("bob")),
        ];
        let mut all: Vec<_> = others.iter().chain([&plain]).map(|refs| refs.own.to_string()).collect();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), 6);
        // What the layers themselves tell apart.
        for change in [
            |source: &mut DockerfileSource| source.target = "x".into(),
            |source: &mut DockerfileSource| source.path = "Dockerfile".into(),
            |source: &mut DockerfileSource| source.revision = "HEAD".into(),
        ] {
            assert_eq!(refs(change, None), plain);
        }
    }

    #[test]
    fn a_branch_falls_back_on_the_default_one() {
        let default = refs(|_| {}, None).own;
        let named = refs(|source| source.revision = "feature/x".into(), None);
        assert_eq!((named.default.clone(), named.branch.as_deref()), (default.clone(), Some("feature/x")));
        assert_eq!(refs(|source| source.revision = "refs/heads/feature/x".into(), None), named);
        let commit = refs(|source| source.revision = "0123456789".repeat(4), None);
        assert_eq!((commit.default, commit.branch), (default.clone(), None));
        assert!(commit.own != default && commit.own != named.own);
    }

    #[test]
    fn a_repository_is_named_without_a_tag() {
        let problems = |repository: &str| {
            LayerCache { repository: Some(repository.into()), ..LayerCache::default() }.problems()
        };
        assert!(problems("r.test:5000/a/b").is_empty());
        for wrong in ["", "r.test/a:1", "UPPER/x", "busybox"] {
            assert_eq!(problems(wrong).len(), 1, "{wrong}");
        }
        assert_eq!(LayerCache { import_seconds: 0, ..LayerCache::default() }.problems().len(), 1);
    }
}
