//! What a build is made from, and which texts may stand in it.
//!
//! The checks here are what keeps a request from reaching past its repository, or from being read as an
//! option by `git` or a build tool. They are made at the edge (gateway) and again where they matter (builder).

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::limits;
use crate::platform::Platform;
use crate::reference::ImageReference;

/// What to build from. Credentials are never part of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// An image that exists: the target becomes a copy of it.
    Image(ImageReference),
    Dockerfile(DockerfileSource),
    /// A kind of a newer release, carried on as it is.
    #[serde(untagged)]
    #[schemars(skip)]
    Unknown(serde_json::Value),
}

impl Source {
    /// Whether this release knows all of it. Of what it doesn't it would make another image than was asked for.
    pub fn is_known(&self) -> bool {
        match self {
            Self::Image(_) => true,
            Self::Dockerfile(source) => source.unknown.is_empty(),
            Self::Unknown(_) => false,
        }
    }
}

/// A Dockerfile in a git repository.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DockerfileSource {
    /// A URL without credentials.
    pub remote_uri: String,
    /// As asked for: a commit, branch or tag; empty for the remote's HEAD.
    pub revision: String,
    /// As asked for, relative to the repository's root; empty for `Dockerfile`.
    pub path: String,
    /// As asked for, relative to the repository's root; empty for the Dockerfile's folder.
    pub context_path: String,
    /// The Dockerfile's own revision; part of the image's identity only.
    pub version: String,
    pub build_args: BTreeMap<String, String>,
    /// The stage to build; empty for the last one.
    pub target: String,
    /// The one to build for; absent for the default one, and where there are several.
    pub platform: Option<Platform>,
    /// Several, which an index is made of, each once and in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub platforms: Vec<Platform>,
    /// With an SLSA provenance attestation, which makes the image an index.
    #[serde(default, skip_serializing_if = "is_false")]
    pub provenance: bool,
    /// With the commit's time for every file's: the same commit makes the same digest.
    #[serde(default, skip_serializing_if = "is_false")]
    pub reproducible: bool,
    /// For requests that name their paths in a workspace: where in it the repository lies; empty or `.` for all of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkout_location: Option<String>,
    /// What a newer release wrote here: carried on as it is.
    #[serde(flatten)]
    #[schemars(skip)]
    pub unknown: BTreeMap<String, serde_json::Value>,
}

fn is_false(value: &bool) -> bool {
    !value
}

impl DockerfileSource {
    /// What it is built for: one, or those of an index.
    pub fn built_for(&self) -> Vec<Platform> {
        if self.platforms.is_empty() {
            vec![self.platform.clone().unwrap_or_default()]
        } else {
            self.platforms.clone()
        }
    }

    /// The same as a request says it, in whatever order and number.
    pub fn for_platforms(self, mut platforms: Vec<Platform>) -> Self {
        platforms.sort();
        platforms.dedup();
        let single = if platforms.len() > 1 { None } else { platforms.pop() };
        Self { platform: single.filter(|one| *one != Platform::default()), platforms, ..self }
    }

    /// The Dockerfile's path, the default filled in.
    pub fn dockerfile(&self) -> &str {
        match self.in_checkout(&self.path) {
            None | Some("") => "Dockerfile",
            Some(path) => path,
        }
    }

    /// The context's path, the default filled in; empty for the repository's root.
    pub fn context(&self) -> &str {
        if self.context_path.is_empty() {
            self.dockerfile().rsplit_once('/').map_or("", |(folder, _)| folder)
        } else {
            self.in_checkout(&self.context_path).unwrap_or_default()
        }
    }

    /// A path as asked for, relative to the repository's root; `None` where it lies elsewhere.
    fn in_checkout<'a>(&self, path: &'a str) -> Option<&'a str> {
        let Some(location) = &self.checkout_location else { return Some(path) };
        let (location, path) = (plain_path(location), plain_path(path));
        if location.is_empty() {
            return Some(path);
        }
        match path.strip_prefix(location)? {
            "" => Some(""),
            rest => rest.strip_prefix('/'),
        }
    }

    /// Checks every field. `file_remotes` admits `file://` URLs.
    pub fn check(&self, file_remotes: bool) -> Result<(), InvalidField> {
        check_remote(&self.remote_uri, file_remotes)?;
        check_revision(&self.revision)?;
        check_path("source.dockerfile.path", &self.path)?;
        check_path("source.dockerfile.context_path", &self.context_path)?;
        if let Some(location) = &self.checkout_location {
            check_path("source.dockerfile.checkout_location", location)?;
            for (field, path) in [
                ("source.dockerfile.path", &self.path),
                ("source.dockerfile.context_path", &self.context_path),
            ] {
                if !path.is_empty() && self.in_checkout(path).is_none() {
                    return Err(InvalidField::new(
                        field,
                        format!("`{path}` is not in the checkout, which is at `{location}`"),
                    ));
                }
            }
        }
        check_text("source.dockerfile.version", &self.version)?;
        check_text("source.dockerfile.target", &self.target)?;
        if self.target.starts_with('-') {
            return Err(InvalidField::new("source.dockerfile.target", "must not begin with '-'"));
        }
        for name in self.build_args.keys() {
            let fits = !name.is_empty()
                && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
                && !name.starts_with(|c: char| c.is_ascii_digit());
            if !fits {
                return Err(InvalidField::new(
                    "source.dockerfile.build_args",
                    "a name must be letters, digits and '_', and not begin with a digit",
                ));
            }
        }
        if self.build_args.values().any(|value| value.contains('\0')) {
            return Err(InvalidField::new("source.dockerfile.build_args", "a value must not contain NUL"));
        }
        Ok(())
    }
}

/// A path without `./` before it and `/` after it; empty for `.`.
fn plain_path(path: &str) -> &str {
    let path = path.trim_end_matches('/');
    let path = path.strip_prefix("./").unwrap_or(path);
    if path == "." { "" } else { path }
}

/// A field of a request that can't be taken, by the name it has in the API.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {problem}")]
pub struct InvalidField {
    pub field: &'static str,
    pub problem: String,
}

impl InvalidField {
    pub fn new(field: &'static str, problem: impl Into<String>) -> Self {
        Self { field, problem: problem.into() }
    }
}

/// A git remote: `https`, `http`, `ssh` or `git`, and `file` where `file_remotes` says so. No credentials in
/// the URL (they would be stored in clear), no other transport (`ext::` runs commands), no option.
pub fn check_remote(uri: &str, file_remotes: bool) -> Result<(), InvalidField> {
    const FIELD: &str = "source.dockerfile.git.remote_uri";
    if uri.is_empty() {
        return Err(InvalidField::new(FIELD, "is missing"));
    }
    check_text(FIELD, uri)?;
    let Some((scheme, rest)) = uri.split_once("://") else {
        return Err(InvalidField::new(FIELD, "must be a URL with https, http, ssh or git as its scheme"));
    };
    match scheme {
        "https" | "http" | "ssh" | "git" => {}
        "file" if file_remotes => {}
        "file" => return Err(InvalidField::new(FIELD, "file:// is not admitted by this installation")),
        _ => return Err(InvalidField::new(FIELD, "the scheme must be https, http, ssh or git")),
    }
    let authority = rest.split('/').next().unwrap_or_default();
    let (user, host) =
        authority.rsplit_once('@').map_or((None, authority), |(user, host)| (Some(user), host));
    if user.is_some_and(|user| scheme != "ssh" || user.contains(':')) {
        return Err(InvalidField::new(
            FIELD,
            "must not contain credentials; give them as username and password",
        ));
    }
    if user.is_some_and(|user| user.starts_with('-')) || host.starts_with('-') {
        return Err(InvalidField::new(FIELD, "the host must not begin with '-'"));
    }
    if host.is_empty() && scheme != "file" {
        return Err(InvalidField::new(FIELD, "has no host"));
    }
    if uri.contains(char::is_whitespace) {
        return Err(InvalidField::new(FIELD, "must not contain white space"));
    }
    Ok(())
}

/// As whom a git remote is asked, username and password: nobody where both are empty, for a token may be given as either.
/// A password alone goes with the username `git`, since servers want one and those that take tokens ignore it.
pub fn git_login<'a>(username: &'a str, password: &'a str) -> Option<(&'a str, &'a str)> {
    match (username, password) {
        ("", "") => None,
        ("", password) => Some(("git", password)),
        login => Some(login),
    }
}

/// What of a git login must not be seen: the password, or the username that stands alone; empty if there is no login.
pub fn git_secret<'a>(username: &'a str, password: &'a str) -> &'a str {
    if password.is_empty() { username } else { password }
}

/// The transports that git may use for a remote: its URL's own, and from http up to https, where a redirect may send it;
/// never down.
pub fn git_transports(uri: &str) -> &[&str] {
    match uri.split_once("://").map(|(scheme, _)| scheme) {
        Some("http") => &["http", "https"],
        Some("https") => &["https"],
        Some("ssh") => &["ssh"],
        Some("git") => &["git"],
        Some("file") => &["file"],
        _ => &[],
    }
}

/// A commit, branch or tag, as `git check-ref-format` would take it, and no option or revision expression.
pub fn check_revision(revision: &str) -> Result<(), InvalidField> {
    const FIELD: &str = "source.dockerfile.git.revision";
    check_text(FIELD, revision)?;
    let refused = revision.starts_with('-')
        || revision.contains("..")
        || revision.contains("@{")
        || revision.contains([' ', '~', '^', ':', '?', '*', '[', '\\'])
        || revision.ends_with(['/', '.'])
        || revision.starts_with('/');
    if refused {
        return Err(InvalidField::new(FIELD, "must be a commit, branch or tag"));
    }
    Ok(())
}

/// A path inside the repository: relative, and no component of it `..`.
pub fn check_path(field: &'static str, path: &str) -> Result<(), InvalidField> {
    check_text(field, path)?;
    if path.starts_with('/') {
        return Err(InvalidField::new(field, "must be relative to the repository's root"));
    }
    if path.split('/').any(|part| part == "..") {
        return Err(InvalidField::new(field, "must not leave the repository"));
    }
    if path.split('/').any(|part| part == ".git") {
        return Err(InvalidField::new(field, "must not name the repository's .git"));
    }
    Ok(())
}

/// A text of at most [`limits::FIELD_BYTES`] without control characters, so that no value can imitate a line.
pub fn check_text(field: &'static str, text: &str) -> Result<(), InvalidField> {
    if text.len() > limits::FIELD_BYTES {
        return Err(InvalidField::new(field, format!("is longer than {} bytes", limits::FIELD_BYTES)));
    }
    if text.chars().any(char::is_control) {
        return Err(InvalidField::new(field, "must not contain control characters"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn remotes() {
        for good in [
            "https://github.com/foo/bar.git",
            "http://127.0.0.1:3000/x",
            "ssh://git@host/x",
            "git://host/x",
            "https://example.com/größe/日本語.git",
        ] {
            assert_eq!(check_remote(good, false), Ok(()), "{good}");
        }
        for bad in [
            "",
            "--upload-pack=touch /tmp/x",
            "ext::sh -c x",
            "file:///etc",
            "/etc",
            "git@host:x",
            "https://",
            "https://user:pass@host/x",
            "https://token@host/x",
            "ssh://-oProxyCommand=x/y",
            "ssh://u:p@host/x",
            "https://-x/y",
            "https://h/\n",
            "https://h/a b",
            "HTTPS://h/x",
        ] {
            assert!(check_remote(bad, false).is_err(), "{bad}");
        }
        assert_eq!(check_remote("file:///srv/x.git", true), Ok(()));
    }

    #[test]
    fn logins_and_transports() {
        for (given, login) in [
            (("", ""), None),
            (("ann", "word"), Some(("ann", "word"))),
            (("token", ""), Some(("token", ""))),
            (("", "token"), Some(("git", "token"))),
        ] {
            assert_eq!(git_login(given.0, given.1), login);
        }
        assert_eq!(git_transports("http://h/x"), ["http", "https"]);
        assert_eq!(git_transports("https://h/x"), ["https"]);
        assert!(git_transports("ext::sh -c x").is_empty());
    }

    #[test]
    fn paths_in_a_workspace_are_of_the_checkout() {
        let check = |location: Option<&str>, path: &str, context: &str| {
            let source = DockerfileSource {
                remote_uri: "https://host/x".into(),
                revision: String::new(),
                path: path.into(),
                context_path: context.into(),
                version: String::new(),
                build_args: BTreeMap::new(),
                target: String::new(),
                platform: None,
                platforms: Vec::new(),
                provenance: false,
                reproducible: false,
                unknown: BTreeMap::new(),
                checkout_location: location.map(Into::into),
            };
            source.check(false).map(|()| (source.dockerfile().to_owned(), source.context().to_owned()))
        };
        for (location, path, context, dockerfile, folder) in [
            (None, "a/D", "", "a/D", "a"),
            (Some(""), "a/D", "", "a/D", "a"),
            (Some("repo"), "repo/a/D", "", "a/D", "a"),
            (Some("."), "a/D", ".", "a/D", ""),
            (Some("repo"), "repo/a/D", "repo", "a/D", ""),
            (Some("repo/"), "./repo/D", "repo/a/", "D", "a"),
        ] {
            let found = check(location, path, context);
            assert_eq!(found, Ok((dockerfile.into(), folder.into())), "{location:?} {path} {context}");
        }
        for (location, path, context) in [
            ("repo", "D", "repo"),
            ("repo", "repository/D", "repo"),
            ("repo", "repo/D", "."),
            ("..", "../D", ".."),
        ] {
            assert!(check(Some(location), path, context).is_err(), "{location} {path} {context}");
        }
    }

    #[test]
    fn paths_and_revisions() {
        for good in ["", "Dockerfile", "a/b", "a b/c", ".gitpod.Dockerfile", "..a/b..", "dossier/é", "."] {
            assert_eq!(check_path("path", good), Ok(()), "{good}");
        }
        for bad in ["/etc/passwd", "../../etc", "a/../b", "a/..", ".git/config", "a\0", "a\nb"] {
            assert!(check_path("path", bad).is_err(), "{bad}");
        }
        for good in ["", "main", "feature/x", "v1.2", "4f45d02eac0000000000000000000000000000000", "ветка"]
        {
            assert_eq!(check_revision(good), Ok(()), "{good}");
        }
        for bad in
            ["-x", "--upload-pack=x", "a..b", "HEAD~1", "HEAD^{/x}", "a:b", "refs/*", "a b", "@{u}", "x/"]
        {
            assert!(check_revision(bad).is_err(), "{bad}");
        }
    }
}
