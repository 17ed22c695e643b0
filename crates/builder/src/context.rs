//! The git context: one commit of a repository, checked out by the real `git`, and the Dockerfile and context in it.
//!
//! What comes from outside reaches git only as an environment, a file or an argument after `--`; the repository can't
//! make it run anything (no hooks, no filters, no submodules, no other transport than the URL's own, or https for http).

use std::io;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kiln_domain::failure::{Failure, FailureReason};
use kiln_domain::run::RunSecrets;
use kiln_domain::source::{DockerfileSource, git_login, git_transports};
use secrecy::ExposeSecret;
use tokio::process::Command;
use tokio::time::{Instant, sleep};

use crate::children::{Children, Finished, Show};
use crate::folder::write_private;

/// Dockerfile and context in a checkout. The repository's `.git` is elsewhere, so that no context contains it.
#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) dockerfile: PathBuf,
    pub(crate) folder: PathBuf,
}

/// A remote that refuses connections is asked again for this long.
const PATIENCE: Duration = Duration::from_secs(120);

/// Fetches `commit` into the work folder and finds Dockerfile and context in it.
pub(crate) async fn fetch(
    source: &DockerfileSource,
    commit: &str,
    secrets: &RunSecrets,
    work: &Path,
    children: &Children,
) -> Result<Context, Failure> {
    let commit_is_one = matches!(commit.len(), 40 | 64) && commit.bytes().all(|b| b.is_ascii_hexdigit());
    if !commit_is_one {
        return Err(Failure::new(FailureReason::Internal, "the run does not name a full commit"));
    }
    let root = work.join("source");
    let git = Git { work, children, source, commit };
    git.prepare(secrets, &root).map_err(|error| internal("cannot prepare the checkout", &error))?;
    git.must(&["init", "--quiet", "--template="]).await?;
    git.get_commit().await?;
    git.must(&["checkout", "--quiet", "--detach", "--force", commit]).await?;
    locate(source, commit, root)
}

/// When a commit that was fetched was made, in seconds since 1970.
pub(crate) async fn commit_time(commit: &str, work: &Path, children: &Children) -> Result<u64, Failure> {
    let mut command = git(work);
    command.args(["show", "--no-patch", "--format=%ct", commit]);
    let ended =
        children.run(command, Show::Nothing).await.map_err(|error| internal("cannot run git", &error))?;
    let told = ended.tail.trim();
    told.parse().map_err(|_| {
        Failure::new(FailureReason::Internal, format!("the commit's time can't be read: {told}"))
    })
}

/// The branch that a remote's HEAD is, where it says so; asked with what [`fetch`] wrote into the work folder.
pub(crate) async fn default_branch(remote: &str, work: &Path, children: &Children) -> Option<String> {
    let mut command = git(work);
    command.args(["ls-remote", "--symref", "--", remote, "HEAD"]);
    let ended = children.run(command, Show::Nothing).await.ok()?;
    let lines = ended.tail.lines().filter(|_| ended.status.success());
    let mut heads = lines.filter_map(|line| line.strip_prefix("ref: refs/heads/")?.strip_suffix("\tHEAD"));
    heads.next().map(str::to_owned)
}

fn git(work: &Path) -> Command {
    let mut git = Children::command(Path::new("git"), work);
    git.env("GIT_DIR", work.join("git"))
        .env("GIT_WORK_TREE", work.join("source"))
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .env("GIT_CONFIG_GLOBAL", work.join("gitconfig"))
        .env("GIT_TERMINAL_PROMPT", "0")
        .env("GIT_SSH_COMMAND", "ssh -oBatchMode=yes")
        .env("GIT_LFS_SKIP_SMUDGE", "1")
        .env("KILN_GIT_CREDENTIALS", work.join("git-credentials"));
    git
}

struct Git<'a> {
    work: &'a Path,
    children: &'a Children,
    source: &'a DockerfileSource,
    commit: &'a str,
}

impl Git<'_> {
    /// Writes git's only configuration, and the credentials if there are any.
    fn prepare(&self, secrets: &RunSecrets, root: &Path) -> io::Result<()> {
        std::fs::create_dir_all(root)?;
        let uri = &self.source.remote_uri;
        let (scheme, rest) = uri.split_once("://").unwrap_or_default();
        let transports = git_transports(uri).iter();
        let admitted: String =
            transports.map(|scheme| format!("[protocol \"{scheme}\"]\n\tallow = always\n")).collect();
        let mut config = format!(
            "[protocol]\n\tallow = never\n{admitted}\
             [core]\n\thooksPath = /dev/null\n[gc]\n\tauto = 0\n[maintenance]\n\tauto = false\n\
             [submodule]\n\trecurse = false\n[fetch]\n\trecurseSubmodules = false\n\
             [http]\n\tfollowRedirects = initial\n\tlowSpeedLimit = 1000\n\tlowSpeedTime = 60\n"
        );
        if scheme == "file" {
            // The repository may belong to another user; the installation admits such remotes.
            config.push_str("[safe]\n\tdirectory = *\n");
        }
        let password = secrets.git_password.as_ref().map_or("", |password| password.expose_secret());
        if let Some((user, password)) = git_login(&secrets.git_username, password) {
            if [user, password].iter().any(|text| text.contains(['\n', '\0'])) {
                return Err(io::Error::other("git's username or password contains a line end or NUL"));
            }
            write_private(
                &self.work.join("git-credentials"),
                format!("username={user}\npassword={password}\n").as_bytes(),
            )?;
            // For this host alone: a redirect elsewhere gets none.
            let host = rest.split('/').next().unwrap_or_default().replace(['"', '\\'], "");
            config.push_str(&format!(
                "[credential \"{scheme}://{host}\"]\n\thelper = \"!f() {{ test \\\"$1\\\" = get && cat \\\"$KILN_GIT_CREDENTIALS\\\"; }}; f\"\n"
            ));
        }
        write_private(&self.work.join("gitconfig"), config.as_bytes())
    }

    async fn run(&self, arguments: &[&str]) -> Result<Finished, Failure> {
        let mut git = git(self.work);
        git.args(arguments);
        self.children.run(git, Show::Nothing).await.map_err(|error| internal("cannot run git", &error))
    }

    async fn must(&self, arguments: &[&str]) -> Result<(), Failure> {
        let ended = self.run(arguments).await?;
        if ended.status.success() { Ok(()) } else { Err(self.failure(&ended)) }
    }

    /// The commit by itself; else, from a server that gives out no unadvertised commit, what was asked for; else all.
    async fn get_commit(&self) -> Result<(), Failure> {
        let uri = self.source.remote_uri.as_str();
        let shallow = |revision| ["fetch", "--quiet", "--no-tags", "--depth", "1", "--", uri, revision];
        if self.fetch(&shallow(self.commit)).await? {
            return Ok(());
        }
        let revision = if self.source.revision.is_empty() { "HEAD" } else { &self.source.revision };
        if self.fetch(&shallow(revision)).await? && self.has_commit().await? {
            return Ok(());
        }
        let all = ["fetch", "--quiet", "--tags", "--", uri, "+refs/heads/*:refs/remotes/origin/*"];
        // What is there of the shallow fetch would keep the history cut.
        let _ = std::fs::remove_file(self.work.join("git/shallow"));
        if self.fetch(&all).await? && self.has_commit().await? {
            return Ok(());
        }
        Err(Failure::new(FailureReason::Context, format!("commit {} is not in `{uri}`", self.commit)))
    }

    async fn has_commit(&self) -> Result<bool, Failure> {
        let name = format!("{}^{{commit}}", self.commit);
        Ok(self.run(&["cat-file", "-e", &name]).await?.status.success())
    }

    /// False where the remote hasn't got, or doesn't give, what was asked for. A remote that refuses connections is asked
    /// again for some time.
    async fn fetch(&self, arguments: &[&str]) -> Result<bool, Failure> {
        const NOT_GIVEN: [&str; 4] =
            ["not our ref", "unadvertised object", "couldn't find remote ref", "could not parse commit"];
        let since = Instant::now();
        let mut told = false;
        loop {
            let ended = self.run(arguments).await?;
            if ended.status.success() {
                return Ok(true);
            }
            if NOT_GIVEN.iter().any(|text| ended.tail.contains(text)) {
                return Ok(false);
            }
            if !ended.tail.to_lowercase().contains("connection refused") || since.elapsed() > PATIENCE {
                return Err(self.failure(&ended));
            }
            if !told {
                self.children
                    .output()
                    .say(&format!("`{}` refuses connections; asking again", self.source.remote_uri));
                told = true;
            }
            sleep(Duration::from_secs(1)).await;
        }
    }

    fn failure(&self, ended: &Finished) -> Failure {
        let tail = &ended.tail;
        if let Some(failure) = killed(ended) {
            return failure;
        }
        if tail.contains("No space left on device") {
            return Failure::new(FailureReason::Internal, "no space left for the checkout");
        }
        let uri = &self.source.remote_uri;
        let line = |prefix: &str| tail.lines().find_map(|line| line.strip_prefix(prefix));
        let told = line("fatal: ").or_else(|| line("error: ")).unwrap_or("git told no reason").trim();
        let told = if told.contains("could not read Username") || told.contains("Authentication failed") {
            "it is not there, or the credentials (if any) do not admit to it"
        } else {
            told
        };
        Failure::new(
            FailureReason::Context,
            format!("cannot fetch `{uri}`: {}", told.replace(&*self.work.to_string_lossy(), "")),
        )
    }
}

/// Of a git that a signal ended: that is never the user's fault, whatever it had said before.
fn killed(ended: &Finished) -> Option<Failure> {
    let signal = ended.status.signal()?;
    Some(Failure::new(FailureReason::Internal, format!("git was killed by signal {signal}")))
}

/// Finds Dockerfile and context in a checkout. Symlinks are followed, but not out of it.
fn locate(source: &DockerfileSource, commit: &str, root: PathBuf) -> Result<Context, Failure> {
    let root = root.canonicalize().map_err(|error| internal("cannot read the checkout", &error))?;
    let short = commit.get(..12).unwrap_or(commit);
    let find = |what: &str, asked: &str| {
        let refuse =
            |problem: &str| Failure::new(FailureReason::Context, format!("{what} `{asked}` {problem}"));
        kiln_domain::source::check_path("path", asked).map_err(|error| refuse(&error.problem))?;
        match root.join(asked).canonicalize() {
            Ok(found) if found.starts_with(&root) => Ok(found),
            // The same words wherever the link leads: what is on the builder's disk is nobody's business.
            _ if has_symlink(&root, asked) => {
                Err(refuse("is a symlink that leads out of the repository, or to nothing"))
            }
            _ => Err(refuse(&format!("is not in `{}` at commit {short}", source.remote_uri))),
        }
    };
    let dockerfile = find("Dockerfile", source.dockerfile())?;
    let folder = find("context", source.context())?;
    let refuse = |text: String| Err(Failure::new(FailureReason::Context, text));
    if !dockerfile.is_file() {
        return refuse(format!("Dockerfile `{}` is not a file", source.dockerfile()));
    }
    if !folder.is_dir() {
        return refuse(format!("context `{}` is not a folder", source.context()));
    }
    Ok(Context { dockerfile, folder })
}

fn has_symlink(root: &Path, path: &str) -> bool {
    let mut at = root.to_owned();
    path.split('/').any(|part| {
        at.push(part);
        at.is_symlink()
    })
}

fn internal(what: &str, error: &io::Error) -> Failure {
    Failure::new(FailureReason::Internal, format!("{what}: {error}"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_git_that_was_killed_is_not_the_users_fault() {
        let ended = |status| Finished {
            status: std::process::ExitStatus::from_raw(status),
            tail: "fatal: early EOF\n".into(),
        };
        let failure = killed(&ended(9)).unwrap();
        assert_eq!(
            (failure.reason, &*failure.message),
            (FailureReason::Internal, "git was killed by signal 9")
        );
        assert!(killed(&ended(128 << 8)).is_none());
    }

    #[test]
    fn nothing_outside_the_repository_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("root");
        std::fs::create_dir_all(root.join("sub/deep")).unwrap();
        std::fs::write(folder.path().join("outside"), "FROM scratch").unwrap();
        std::fs::write(root.join("sub/Dockerfile"), "FROM scratch").unwrap();
        symlink("sub/Dockerfile", root.join("inside")).unwrap();
        symlink("../outside", root.join("out")).unwrap();
        symlink("/nowhere", root.join("nowhere")).unwrap();
        symlink("..", root.join("up")).unwrap();
        let check = |path: &str, context: &str| {
            let source = DockerfileSource {
                remote_uri: "https://host/x".into(),
                revision: String::new(),
                path: path.into(),
                context_path: context.into(),
                version: String::new(),
                build_args: Default::default(),
                target: String::new(),
                checkout_location: None,
                platform: None,
                platforms: Vec::new(),
                provenance: false,
                reproducible: false,
                unknown: Default::default(),
            };
            locate(&source, "0123456789abcdef", root.clone()).map_err(|failure| failure.message)
        };
        assert!(check("sub/Dockerfile", "").unwrap().folder.ends_with("root/sub"));
        assert!(check("inside", "sub/deep").unwrap().dockerfile.ends_with("root/sub/Dockerfile"));
        for (path, context, expected) in [
            ("out", "", "Dockerfile `out` is a symlink that leads out of the repository, or to nothing"),
            (
                "nowhere",
                "",
                "Dockerfile `nowhere` is a symlink that leads out of the repository, or to nothing",
            ),
            (
                "up/outside",
                "",
                "Dockerfile `up/outside` is a symlink that leads out of the repository, or to nothing",
            ),
            ("inside", "up", "context `up` is a symlink that leads out of the repository, or to nothing"),
            ("missing", "", "Dockerfile `missing` is not in `https://host/x` at commit 0123456789ab"),
            ("sub", "", "Dockerfile `sub` is not a file"),
            ("inside", "inside", "context `inside` is not a folder"),
            ("../outside", "", "Dockerfile `../outside` must not leave the repository"),
        ] {
            assert_eq!(check(path, context).unwrap_err(), expected);
        }
    }
}
