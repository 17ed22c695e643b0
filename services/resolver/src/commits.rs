//! Which commit a revision of a git remote is now, and whether the caller may read the remote at all.

use std::sync::Arc;
use std::time::Duration;

use kiln_domain::limits::truncated;
use kiln_domain::source::{InvalidField, check_remote, check_revision, git_secret};
use moka::future::Cache;
use secrecy::{ExposeSecret as _, SecretString};

use crate::complaint::{Complaint, understand};
use crate::config::Config;
use crate::git::{Failure, Git, Ref, Remote, is_commit};
use crate::keys::{Asker, Keys};
use crate::metrics::Metrics;

pub(crate) struct Commits {
    git: Git,
    file_remotes: bool,
    /// Lists of remotes, for seconds.
    lists: Cache<[u8; 32], Arc<Vec<Ref>>>,
    keys: Keys,
    metrics: Metrics,
}

/// A revision that somebody wants resolved.
pub(crate) struct Wanted {
    pub(crate) remote_uri: String,
    pub(crate) revision: String,
    pub(crate) username: String,
    pub(crate) password: SecretString,
}

/// Why there is no commit. The remote's URI has no credentials in it; the complaints are scrubbed of them.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Invalid(#[from] InvalidField),
    #[error("`{revision}` is neither a branch nor a tag of {remote}")]
    NoRevision { remote: String, revision: String },
    #[error("{remote} has no HEAD: it is empty, or its default branch is missing")]
    NoHead { remote: String },
    #[error("`{revision}` looks like an abbreviated commit: give all of its digits, or a branch or tag")]
    Abbreviated { revision: String },
    #[error("{remote}: {complaint}")]
    Remote { remote: String, complaint: Complaint },
    #[error("{remote} did not answer within {within:?}")]
    Late { remote: String, within: Duration },
    #[error("{remote} lists more refs than can be taken")]
    TooLong { remote: String },
    #[error("git can't be run")]
    Program(#[source] std::io::Error),
}

impl Commits {
    pub(crate) fn new(config: &Config, keys: Keys, metrics: Metrics) -> Self {
        Self {
            git: Git::new(&config.git, config.git_timeout(), config.git_at_once),
            file_remotes: config.file_remotes,
            lists: Cache::builder().max_capacity(1_000).time_to_live(config.commit_fresh_for()).build(),
            keys,
            metrics,
        }
    }

    /// The commit's full name, in lower case. A full commit is taken as it is, once its remote let itself be read.
    pub(crate) async fn resolve(&self, wanted: &Wanted) -> Result<String, Arc<Error>> {
        self.check(wanted).map_err(|error| Arc::new(error.into()))?;
        let patterns = candidates(&wanted.revision);
        let asker = Asker::Shows(["password", &wanted.username, wanted.password.expose_secret()]);
        let mut texts = vec![wanted.remote_uri.as_str()];
        texts.extend(patterns.iter().map(String::as_str));
        // Needs no HEAD to be there: must not join a question that does.
        texts.extend(is_commit(&wanted.revision).then_some("readable"));
        let key = self.keys.of("commit", &texts, &asker);
        let list = async {
            let list = self.list(wanted, &patterns).await?;
            // A revision that isn't there yet is not remembered: it may be pushed any moment.
            pick(&wanted.remote_uri, &wanted.revision, &list)?;
            Ok(Arc::new(list))
        };
        let list = self.lists.try_get_with(key, list).await?;
        Ok(pick(&wanted.remote_uri, &wanted.revision, &list)?)
    }

    fn check(&self, wanted: &Wanted) -> Result<(), InvalidField> {
        check_remote(&wanted.remote_uri, self.file_remotes)?;
        check_revision(&wanted.revision)?;
        // git's credential protocol has a value end with its line.
        for (field, text) in [
            ("source.dockerfile.git.username", wanted.username.as_str()),
            ("source.dockerfile.git.password", wanted.password.expose_secret()),
        ] {
            if text.contains(['\n', '\r', '\0']) {
                return Err(InvalidField::new(field, "must not contain a line end or NUL"));
            }
        }
        Ok(())
    }

    async fn list(&self, wanted: &Wanted, patterns: &[String]) -> Result<Vec<Ref>, Error> {
        let remote =
            Remote { uri: &wanted.remote_uri, username: &wanted.username, password: &wanted.password };
        self.metrics.remote_asked();
        let shown = shown(&wanted.remote_uri);
        self.git.list(&remote, patterns).await.map_err(|failure| match failure {
            Failure::Program(error) => Error::Program(error),
            Failure::Late(within) => Error::Late { remote: shown, within },
            Failure::TooLong => Error::TooLong { remote: shown },
            Failure::Complained(text) => {
                let secret = git_secret(&wanted.username, wanted.password.expose_secret());
                Error::Remote { remote: shown, complaint: understand(&text, secret) }
            }
        })
    }
}

/// A URI or revision, fit for a message.
fn shown(text: &str) -> String {
    truncated(text.to_owned(), 200)
}

/// The refs that a revision may name, the best first: a branch before a tag, and of a tag what it stands for. A full
/// commit can't be asked for: that HEAD is told shows that the remote may be read.
fn candidates(revision: &str) -> Vec<String> {
    match revision {
        "" | "HEAD" => vec!["HEAD".into()],
        commit if is_commit(commit) => vec!["HEAD".into()],
        whole if whole.starts_with("refs/") => vec![format!("{whole}^{{}}"), whole.into()],
        name => {
            vec![format!("refs/heads/{name}"), format!("refs/tags/{name}^{{}}"), format!("refs/tags/{name}")]
        }
    }
}

/// The commit of a revision in a list of its candidates.
fn pick(remote: &str, revision: &str, list: &[Ref]) -> Result<String, Error> {
    if is_commit(revision) {
        return Ok(revision.to_ascii_lowercase());
    }
    // The list also has refs that only end so, as `refs/heads/refs/heads/main`.
    let candidates = candidates(revision);
    let found = candidates.iter().find_map(|name| list.iter().find(|listed| listed.name == *name));
    match found {
        Some(listed) => Ok(listed.commit.to_ascii_lowercase()),
        None if matches!(revision, "" | "HEAD") => Err(Error::NoHead { remote: shown(remote) }),
        None if is_abbreviated(revision) => Err(Error::Abbreviated { revision: revision.to_owned() }),
        None => Err(Error::NoRevision { remote: shown(remote), revision: shown(revision) }),
    }
}

fn is_abbreviated(revision: &str) -> bool {
    (4..64).contains(&revision.len()) && revision.bytes().all(|b| b.is_ascii_hexdigit())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn commit(digit: char) -> String {
        digit.to_string().repeat(40)
    }

    #[test]
    fn a_branch_before_a_tag_and_of_a_tag_its_commit() {
        let list: Vec<Ref> = [
            ('1', "HEAD"),
            ('2', "refs/heads/main"),
            ('3', "refs/heads/refs/heads/odd"),
            ('4', "refs/heads/both"),
            ('5', "refs/tags/both"),
            ('6', "refs/tags/v1"),
            ('7', "refs/tags/v1^{}"),
            ('8', "refs/tags/light"),
            ('9', "refs/heads/cafe"),
        ]
        .into_iter()
        .map(|(digit, name)| Ref { commit: commit(digit), name: name.into() })
        .collect();
        let picked = |revision: &str| pick("r", revision, &list).map_err(|error| error.to_string());
        for (revision, digit) in [
            ("", '1'),
            ("HEAD", '1'),
            ("main", '2'),
            ("refs/heads/main", '2'),
            ("both", '4'),
            ("refs/tags/both", '5'),
            ("v1", '7'),
            ("refs/tags/v1", '7'),
            ("light", '8'),
            ("cafe", '9'),
        ] {
            assert_eq!(picked(revision), Ok(commit(digit)), "{revision}");
        }
        assert_eq!(picked(&"A".repeat(40)), Ok(commit('a')), "a full commit is taken as it is");
        for (revision, error) in [
            ("odd", "`odd` is neither a branch nor a tag of r"),
            (
                "deadbeef",
                "`deadbeef` looks like an abbreviated commit: give all of its digits, or a branch or tag",
            ),
        ] {
            assert_eq!(picked(revision), Err(error.to_owned()));
        }
        assert!(matches!(pick("r", "", &[]), Err(Error::NoHead { .. })));
    }
}
