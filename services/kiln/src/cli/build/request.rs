//! The options of `kiln build`, and the request they make.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use jiff::SignedDuration;
use kiln_proto::kiln_v1::source::From as SourceFrom;
use kiln_proto::kiln_v1::{BuildImageRequest, Dockerfile, GitContext, Source};

use super::super::connection::Connection;
use super::super::failure::Failure;
use super::super::output::OutputArgs;
use super::registry::RegistryArgs;

const PASSWORD_VARIABLE: &str = "KILN_GIT_PASSWORD";

/// Options of `kiln build`.
#[derive(Debug, clap::Args)]
pub(crate) struct BuildArgs {
    /// The git repository: a URL with https, http, ssh or git
    #[arg(value_name = "GIT_URL", required_unless_present = "image")]
    git_url: Option<String>,
    /// Copy this image instead of building from a repository
    #[arg(long, value_name = "REF", conflicts_with_all = ["git_url", "revision", "file", "context", "build_args", "target", "platforms", "provenance", "reproducible", "secrets", "git_username", "git_password_file"])]
    image: Option<String>,
    /// A commit, branch or tag [default: the remote's HEAD]
    #[arg(long, value_name = "REVISION")]
    revision: Option<String>,
    /// The Dockerfile, relative to the repository's root [default: Dockerfile]
    #[arg(long, short, value_name = "PATH")]
    file: Option<String>,
    /// The build context, relative to the repository's root [default: the Dockerfile's folder]
    #[arg(long, value_name = "PATH")]
    context: Option<String>,
    /// A build argument; may be given several times
    #[arg(long = "build-arg", value_name = "NAME=VALUE", value_parser = key_value)]
    build_args: Vec<(String, String)>,
    /// The stage to build [default: the last one]
    #[arg(long, value_name = "STAGE")]
    target: Option<String>,
    /// Build for these, e.g. linux/amd64,linux/arm64: several make an image index [default: linux/amd64]
    #[arg(long = "platform", value_name = "PLATFORM", value_delimiter = ',')]
    platforms: Vec<String>,
    /// Attest what it was made of (SLSA provenance), which makes the image an index
    #[arg(long)]
    provenance: bool,
    /// Give every file the commit's time, so that the same commit makes the same digest
    #[arg(long)]
    reproducible: bool,
    /// A file for `RUN --mount=type=secret,id=ID`; may be given several times. It is no part of the image, and not shown
    #[arg(long = "secret", value_name = "id=ID,src=FILE", value_parser = secret)]
    secrets: Vec<(String, PathBuf)>,
    /// Build even where the image exists
    #[arg(long)]
    force: bool,
    /// Use no cached layers
    #[arg(long)]
    no_cache: bool,
    /// A label of the build; may be given several times
    #[arg(long = "label", value_name = "NAME=VALUE", value_parser = key_value)]
    labels: Vec<(String, String)>,
    /// For whom it is built
    #[arg(long, value_name = "NAME")]
    owner: Option<String>,
    /// The longest it may run, e.g. 90s, 20m, 1h30m [default: the service's limit]
    #[arg(long, value_name = "DURATION", value_parser = timeout)]
    timeout: Option<SignedDuration>,
    /// The user name for the git remote
    #[arg(long, value_name = "NAME")]
    git_username: Option<String>,
    /// A file with the password or token for the git remote; or set KILN_GIT_PASSWORD
    #[arg(long, value_name = "FILE")]
    git_password_file: Option<PathBuf>,
    #[command(flatten)]
    registry: RegistryArgs,
    /// Write the build's id and leave it running
    #[arg(long, short)]
    pub(super) detach: bool,
    #[command(flatten)]
    pub(super) connection: Connection,
    #[command(flatten)]
    pub(super) output: OutputArgs,
}

impl BuildArgs {
    /// The request. Reads the files that it names; [`Failure::Request`] if one can't be read.
    pub(super) fn into_request(self) -> Result<BuildImageRequest, Failure> {
        let auth = self.registry.auth()?;
        let secrets = self.secrets.into_iter().map(read_secret).collect::<Result<_, Failure>>()?;
        let from = match self.image {
            Some(image) => SourceFrom::Image(image),
            None => SourceFrom::Dockerfile(Dockerfile {
                git: Some(GitContext {
                    remote_uri: self.git_url.unwrap_or_default(),
                    revision: self.revision.unwrap_or_default(),
                    username: self.git_username.unwrap_or_default(),
                    password: git_password(self.git_password_file.as_deref())?,
                }),
                path: self.file.unwrap_or_default(),
                context_path: self.context.unwrap_or_default(),
                build_args: last_of_each(self.build_args),
                target: self.target.unwrap_or_default(),
                platforms: self.platforms,
                provenance: self.provenance,
                reproducible: self.reproducible,
                ..Dockerfile::default()
            }),
        };
        Ok(BuildImageRequest {
            source: Some(Source { from: Some(from) }),
            auth,
            force: self.force,
            owner: self.owner.unwrap_or_default(),
            timeout: self.timeout.map(|timeout| prost_types::Duration {
                seconds: timeout.as_secs(),
                nanos: timeout.subsec_nanos(),
            }),
            labels: last_of_each(self.labels),
            no_cache: self.no_cache,
            secrets,
        })
    }
}

/// A value may be empty and may contain `=`; a name may not.
fn key_value(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some(("", _)) => Err("there is no name before the '='".into()),
        Some((name, value)) => Ok((name.to_owned(), value.to_owned())),
        None => Err("expected NAME=VALUE".into()),
    }
}

/// As `docker build` takes it: `id=ID,src=FILE`.
fn secret(text: &str) -> Result<(String, PathBuf), String> {
    let (mut id, mut file) = (None, None);
    for part in text.split(',') {
        match part.split_once('=') {
            Some(("id", value)) => id = Some(value.to_owned()),
            Some(("src" | "source", value)) => file = Some(PathBuf::from(value)),
            Some(("type", "file")) => {}
            _ => return Err("expected id=ID,src=FILE".into()),
        }
    }
    id.zip(file).ok_or_else(|| "expected id=ID,src=FILE".into())
}

fn read_secret((id, file): (String, PathBuf)) -> Result<(String, Vec<u8>), Failure> {
    let content = std::fs::read(&file);
    let content = content.map_err(|error| {
        Failure::Request(format!("can't read the secret {id} from {}: {error}", file.display()))
    })?;
    Ok((id, content))
}

fn timeout(text: &str) -> Result<SignedDuration, String> {
    match text.parse::<SignedDuration>() {
        Ok(timeout) if timeout.is_positive() => Ok(timeout),
        Ok(_) => Err("must be more than nothing".into()),
        Err(_) => Err("expected a duration such as 90s, 20m or 1h30m".into()),
    }
}

/// As with Docker, the last one given of a name counts.
fn last_of_each(pairs: Vec<(String, String)>) -> HashMap<String, String> {
    pairs.into_iter().collect()
}

/// The file's content, one line end at its end dropped; else the environment variable's; else empty.
#[expect(
    clippy::disallowed_methods,
    reason = "as an argument with a variable, which is what clap offers, the password could stand in a process list"
)]
fn git_password(file: Option<&Path>) -> Result<String, Failure> {
    let Some(file) = file else { return Ok(std::env::var(PASSWORD_VARIABLE).unwrap_or_default()) };
    let unreadable =
        |why: String| Failure::Request(format!("can't read the git password from {}: {why}", file.display()));
    let content = std::fs::read_to_string(file).map_err(|error| unreadable(error.to_string()))?;
    let password =
        content.strip_suffix('\n').map_or(content.as_str(), |line| line.strip_suffix('\r').unwrap_or(line));
    if password.is_empty() {
        return Err(unreadable("it is empty".into()));
    }
    Ok(password.to_owned())
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    #[derive(Debug, clap::Parser)]
    struct Program {
        #[command(flatten)]
        args: BuildArgs,
    }

    fn parse(words: &[&str]) -> Result<BuildImageRequest, String> {
        let program =
            Program::try_parse_from([&["build"], words].concat()).map_err(|error| error.to_string())?;
        program.args.into_request().map_err(|error| error.to_string())
    }

    fn dockerfile(request: BuildImageRequest) -> Dockerfile {
        match request.source.and_then(|source| source.from) {
            Some(SourceFrom::Dockerfile(dockerfile)) => dockerfile,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn options_become_a_request() {
        let folder = tempfile::tempdir().unwrap();
        let password = folder.path().join("password");
        std::fs::write(&password, "s3cret word\r\n").unwrap();
        let words = [
            "https://h/x",
            "--revision",
            "v1",
            "-f",
            "a/Dockerfile",
            "--context",
            ".",
            "--platform",
            "linux/amd64,linux/arm64",
            "--target",
            "release",
            "--build-arg",
            "A=1",
            "--build-arg",
            "B==x=",
            "--build-arg",
            "A=2",
            "--build-arg",
            "C=",
            "--label",
            "team=web",
            "--force",
            "--no-cache",
            "--owner",
            "alice",
            "--timeout",
            "1h30m",
            "--git-username",
            "me",
            "--git-password-file",
            password.to_str().unwrap(),
        ];
        let request = parse(&words).unwrap();
        assert!(request.force && request.no_cache);
        assert_eq!(request.owner, "alice");
        assert_eq!(request.timeout, Some(prost_types::Duration { seconds: 5_400, nanos: 0 }));
        assert_eq!(request.labels, [("team".to_owned(), "web".to_owned())].into());
        assert_eq!(request.auth, None);
        let dockerfile = dockerfile(request);
        assert_eq!((dockerfile.path.as_str(), dockerfile.context_path.as_str()), ("a/Dockerfile", "."));
        assert_eq!(dockerfile.target, "release");
        assert_eq!(dockerfile.platforms, ["linux/amd64", "linux/arm64"]);
        let args =
            [("A", "2"), ("B", "=x="), ("C", "")].map(|(name, value)| (name.to_owned(), value.to_owned()));
        assert_eq!(dockerfile.build_args, args.into());
        let git = dockerfile.git.unwrap();
        assert_eq!((git.remote_uri.as_str(), git.revision.as_str()), ("https://h/x", "v1"));
        assert_eq!((git.username.as_str(), git.password.as_str()), ("me", "s3cret word"));
    }

    #[test]
    fn an_image_is_a_source_of_its_own() {
        let request = parse(&["--image", "ubuntu"]).unwrap();
        assert_eq!(request.source.unwrap().from, Some(SourceFrom::Image("ubuntu".into())));
        for words in [
            &[][..],
            &["https://h/x", "--image", "ubuntu"],
            &["--image", "ubuntu", "--revision", "x"],
            &["--image", "ubuntu", "--build-arg", "A=1"],
        ] {
            assert!(parse(words).is_err(), "{words:?}");
        }
    }

    #[test]
    fn what_is_not_an_option_is_refused() {
        for (words, problem) in [
            (&["u", "--build-arg", "A"][..], "expected NAME=VALUE"),
            (&["u", "--label", "=x"], "no name"),
            (&["u", "--timeout", "soon"], "expected a duration"),
            (&["u", "--timeout", "0s"], "more than nothing"),
            (&["u", "--timeout=-5s"], "more than nothing"),
            (&["u", "--git-password-file", "/nonexistent/x"], "can't read the git password"),
            (&["u", "--git-password", "x"], "unexpected argument"),
        ] {
            let error = parse(words).unwrap_err();
            assert!(error.contains(problem), "{words:?}: {error}");
        }
    }
}
