//! `git ls-remote` as a child that asks nobody, reads nobody's configuration, and bears no secret in its arguments.

use std::ffi::OsString;
use std::io;
use std::process::Stdio;
use std::time::Duration;

use kiln_domain::source::{git_login, git_transports};
use rustix::process::{Pid, Signal, kill_process_group};
use secrecy::{ExposeSecret as _, SecretString};
use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio::process::{Child, Command};
use tokio::sync::Semaphore;

/// What git may see of this process's environment: where programs and certificates are, proxies, the installation's
/// ssh agent.
const PASSED_ON: [&str; 13] = [
    "PATH",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "SSH_AUTH_SOCK",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "ALL_PROXY",
    "http_proxy",
    "https_proxy",
    "no_proxy",
    "all_proxy",
    "TMPDIR",
];
/// A few lines are expected; a remote may have any number of refs that end like the one asked for.
const LIST_BYTES: usize = 256 * 1024;
/// What is kept of git's complaints: their end says why.
const COMPLAINT_BYTES: usize = 8 * 1024;

/// Gives git the credentials that are in its own environment, when it asks for those of the remote's host.
const CREDENTIAL_HELPER: &str = r#"!f() { test "$1" = get && printf 'username=%s\npassword=%s\n' "$KILN_GIT_USERNAME" "$KILN_GIT_PASSWORD"; }; f"#;

pub(crate) struct Git {
    program: String,
    within: Duration,
    free: Semaphore,
}

/// A remote, and as whom it is asked. Its URI has passed `domain::source::check_remote`.
pub(crate) struct Remote<'a> {
    pub(crate) uri: &'a str,
    pub(crate) username: &'a str,
    pub(crate) password: &'a SecretString,
}

impl Remote<'_> {
    fn login(&self) -> Option<(&str, &str)> {
        git_login(self.username, self.password.expose_secret())
    }
}

/// A line of the list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Ref {
    pub(crate) commit: String,
    pub(crate) name: String,
}

/// Why there is no list.
#[derive(Debug)]
pub(crate) enum Failure {
    /// git could not be run.
    Program(io::Error),
    /// Not answered in time.
    Late(Duration),
    /// The list is longer than any honest one.
    TooLong,
    /// git ended with an error; what it wrote. It may hold what the remote wrote, and credentials.
    Complained(String),
}

impl Git {
    pub(crate) fn new(program: &str, within: Duration, at_once: usize) -> Self {
        Self { program: program.into(), within, free: Semaphore::new(at_once) }
    }

    /// The refs of a remote that are called as `patterns` say, or end so.
    pub(crate) async fn list(&self, remote: &Remote<'_>, patterns: &[String]) -> Result<Vec<Ref>, Failure> {
        let listed = async {
            // Never closed: an error can't be.
            let _permit = self.free.acquire().await;
            run(self.command(remote, patterns)).await
        };
        let text =
            tokio::time::timeout(self.within, listed).await.map_err(|_| Failure::Late(self.within))??;
        Ok(text.lines().filter_map(parse).collect())
    }

    fn command(&self, remote: &Remote<'_>, patterns: &[String]) -> Command {
        let mut command = Command::new(&self.program);
        let passed = std::env::vars_os().filter(|(name, _)| PASSED_ON.iter().any(|passed| name == passed));
        command
            .env_clear()
            .envs(passed.collect::<Vec<(OsString, OsString)>>())
            .env("LC_ALL", "C")
            // No .netrc, no configuration, no repository that this process happens to stand in.
            .env("HOME", "/nonexistent")
            .env("GIT_CONFIG_NOSYSTEM", "1")
            .env("GIT_CONFIG_GLOBAL", "/dev/null")
            .env("GIT_DIR", "/nonexistent")
            .env("GIT_TERMINAL_PROMPT", "0")
            .env("GIT_SSH_COMMAND", "ssh -o BatchMode=yes")
            // git then takes `protocol.allow` for never, and these for always, redirects included.
            .env("GIT_ALLOW_PROTOCOL", git_transports(remote.uri).join(":"));
        let settings = settings(remote);
        command.env("GIT_CONFIG_COUNT", settings.len().to_string());
        for (number, (key, value)) in settings.iter().enumerate() {
            command
                .env(format!("GIT_CONFIG_KEY_{number}"), key)
                .env(format!("GIT_CONFIG_VALUE_{number}"), value);
        }
        if let Some((username, password)) = remote.login() {
            command.env("KILN_GIT_USERNAME", username).env("KILN_GIT_PASSWORD", password);
        }
        command.args(["ls-remote", "--quiet", "--", remote.uri]).args(patterns);
        command.current_dir("/").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // A group of its own, so that git's helpers can be ended with it.
        command.process_group(0).kill_on_drop(true);
        command
    }
}

/// git's settings for one remote.
fn settings(remote: &Remote<'_>) -> Vec<(String, &'static str)> {
    let mut settings = vec![("credential.helper".into(), ""), ("http.followRedirects".into(), "initial")];
    if remote.login().is_some()
        && let Some((scheme @ ("http" | "https"), rest)) = remote.uri.split_once("://")
    {
        // git asks this helper for this host and port alone: a redirect to another gets nothing.
        let host = rest.split(['/', '?', '#']).next().unwrap_or_default();
        settings.push((format!("credential.{scheme}://{host}.helper"), CREDENTIAL_HELPER));
    }
    settings
}

async fn run(mut command: Command) -> Result<String, Failure> {
    let mut child = Group { child: command.spawn().map_err(Failure::Program)? };
    let (Some(out), Some(err)) = (child.child.stdout.take(), child.child.stderr.take()) else {
        return Err(Failure::Program(io::Error::other("its output can't be read")));
    };
    let complaint = async { tail_of(err).await.map_err(Failure::Program) };
    let (list, complaint) = tokio::try_join!(list_of(out), complaint)?;
    let status = child.child.wait().await.map_err(Failure::Program)?;
    if status.success() {
        Ok(list)
    } else if complaint.is_empty() {
        Err(Failure::Complained(status.to_string()))
    } else {
        Err(Failure::Complained(complaint))
    }
}

async fn list_of(out: impl AsyncRead + Unpin) -> Result<String, Failure> {
    let mut list = Vec::new();
    out.take(LIST_BYTES as u64 + 1).read_to_end(&mut list).await.map_err(Failure::Program)?;
    if list.len() > LIST_BYTES {
        return Err(Failure::TooLong);
    }
    Ok(String::from_utf8_lossy(&list).into_owned())
}

async fn tail_of(mut err: impl AsyncRead + Unpin) -> io::Result<String> {
    let mut tail = Vec::new();
    while err.read_buf(&mut tail).await? > 0 {
        let excess = tail.len().saturating_sub(COMPLAINT_BYTES);
        tail.drain(..excess);
    }
    Ok(String::from_utf8_lossy(&tail).into_owned())
}

/// A child and all that it starts, ended when this is dropped before the child was waited for.
struct Group {
    child: Child,
}

impl Drop for Group {
    fn drop(&mut self) {
        // `id` is there until the child was waited for: it can't be another process's yet.
        let leader = self.child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
        if let Some(leader) = leader {
            let _ = kill_process_group(leader, Signal::KILL);
        }
    }
}

/// `<hex digits> TAB <name>`.
fn parse(line: &str) -> Option<Ref> {
    let (commit, name) = line.split_once('\t')?;
    is_commit(commit).then(|| Ref { commit: commit.to_owned(), name: name.to_owned() })
}

/// Whether a text is a whole object name: of sha1, or of sha256.
pub(crate) fn is_commit(text: &str) -> bool {
    matches!(text.len(), 40 | 64) && text.bytes().all(|b| b.is_ascii_hexdigit())
}
