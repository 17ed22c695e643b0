//! What a request of the compatible API is to be built from.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use kiln_contract::secrets::{Secrets, Workspace};
use kiln_domain::limits;
use kiln_domain::source::DockerfileSource;
use kiln_proto::builder as api;
use kiln_proto::builder::build_source::From;
use kiln_proto::contentservice as content;
use kiln_proto::contentservice::workspace_initializer::Spec;
use prost::Message as _;
use tonic::Status;

/// A request's source.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Given {
    /// An image, as the user wrote it.
    Image(String),
    Dockerfile(Box<Dockerfile>),
}

/// A Dockerfile in a git repository.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Dockerfile {
    pub(crate) source: DockerfileSource,
    /// What the image is named by; not always what is checked out.
    pub(crate) clone_target: String,
    /// With the credentials for the repository, and the initializer as it came.
    pub(crate) secrets: Secrets,
    /// Why a builder of ours could not fetch it.
    pub(crate) unfetchable: Option<&'static str>,
}

pub(crate) fn given(source: Option<api::BuildSource>) -> Result<Given, Status> {
    let source = source.ok_or_else(|| Status::invalid_argument("build source is missing"))?;
    match source.from {
        None => Err(unresolvable("invalid base image")),
        Some(From::Ref(reference)) => Ok(Given::Image(reference.r#ref)),
        Some(From::File(file)) => Ok(Given::Dockerfile(Box::new(dockerfile(file)?))),
    }
}

fn unresolvable(problem: &str) -> Status {
    Status::invalid_argument(format!("cannot resolve base image: {problem}"))
}

fn dockerfile(file: api::BuildSourceDockerfile) -> Result<Dockerfile, Status> {
    let whole = file.source.as_ref().map(|initializer| STANDARD.encode(initializer.encode_to_vec()));
    let Some(Spec::Git(git)) = file.source.and_then(|initializer| initializer.spec) else {
        return Err(unresolvable("unsupported context initializer"));
    };
    use content::CloneTargetMode::{LocalBranch, RemoteBranch, RemoteCommit, RemoteHead};
    let (revision, unfetchable) = match content::CloneTargetMode::try_from(git.target_mode) {
        Ok(RemoteHead) => (String::new(), None),
        Ok(RemoteCommit | RemoteBranch) => (git.clone_taget.clone(), None),
        Ok(LocalBranch) => {
            let why = "a local branch (target_mode LOCAL_BRANCH) is nowhere to be fetched from";
            (String::new(), Some(why))
        }
        Err(_) => (String::new(), Some("its target_mode is none that is known here")),
    };
    let config = git.config.unwrap_or_default();
    let workspace = Workspace { initializer: whole.unwrap_or_default(), supervisor_ref: String::new() };
    let mut secrets = Secrets { workspace: Some(workspace), ..Secrets::default() };
    match config.authentication() {
        content::GitAuthMethod::NoAuth => {}
        content::GitAuthMethod::BasicAuth => {
            check_login(&config.auth_user, &config.auth_password)?;
            secrets.git_username = config.auth_user;
            secrets.git_password = config.auth_password;
        }
        content::GitAuthMethod::BasicAuthOts => {
            check_one_time_url(&config.auth_ots)?;
            secrets.git_one_time_url = config.auth_ots;
        }
    }
    let source = DockerfileSource {
        remote_uri: git.remote_uri,
        revision,
        path: file.dockerfile_path,
        context_path: file.context_path,
        version: file.dockerfile_version,
        checkout_location: Some(git.checkout_location),
        ..DockerfileSource::default()
    };
    Ok(Dockerfile { source, clone_target: git.clone_taget, secrets, unfetchable })
}

fn check_one_time_url(url: &str) -> Result<(), Status> {
    let is_web = ["http://", "https://"].iter().any(|scheme| url.starts_with(scheme));
    if !is_web || url.len() > limits::FIELD_BYTES {
        return Err(Status::invalid_argument(
            "source.file.source.git.config.auth_ots: is no http:// or https:// URL, or is too long",
        ));
    }
    Ok(())
}

fn check_login(user: &str, password: &str) -> Result<(), Status> {
    let wrong = |text: &str| text.len() > limits::FIELD_BYTES || text.contains(['\0', '\n', '\r']);
    if wrong(user) || wrong(password) {
        return Err(Status::invalid_argument(
            "source.file.source.git.config: user or password is too long or contains a line end",
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn git(change: impl FnOnce(&mut content::GitInitializer)) -> Dockerfile {
        let mut git = content::GitInitializer {
            remote_uri: "https://git.test/x.git".into(),
            clone_taget: "main".into(),
            checkout_location: "x".into(),
            ..Default::default()
        };
        change(&mut git);
        let file = api::BuildSourceDockerfile {
            source: Some(content::WorkspaceInitializer { spec: Some(Spec::Git(git)) }),
            dockerfile_version: "abc".into(),
            dockerfile_path: "x/Dockerfile".into(),
            context_path: "x".into(),
        };
        match given(Some(api::BuildSource { from: Some(From::File(file)) })).unwrap() {
            Given::Dockerfile(dockerfile) => *dockerfile,
            Given::Image(image) => panic!("{image}"),
        }
    }

    #[test]
    fn the_target_mode_says_what_is_fetched_and_the_clone_target_what_it_is_called() {
        use content::CloneTargetMode::{LocalBranch, RemoteBranch, RemoteCommit, RemoteHead};
        for (mode, revision, fetchable) in [
            (RemoteHead, "", true),
            (RemoteCommit, "main", true),
            (RemoteBranch, "main", true),
            (LocalBranch, "", false),
        ] {
            let dockerfile = git(|git| git.set_target_mode(mode));
            assert_eq!(dockerfile.source.revision, revision, "{mode:?}");
            assert_eq!(dockerfile.clone_target, "main");
            assert_eq!(dockerfile.unfetchable.is_none(), fetchable, "{mode:?}");
            assert_eq!((dockerfile.source.dockerfile(), dockerfile.source.context()), ("Dockerfile", ""));
        }
        // A workspace may know it; a builder of ours would take the wrong commit.
        assert!(git(|git| git.target_mode = 77).unfetchable.is_some());
    }

    #[test]
    fn credentials_are_taken_as_the_method_says() {
        let with = |method: content::GitAuthMethod| {
            git(|git| {
                let mut config = content::GitConfig {
                    auth_user: "ann".into(),
                    auth_password: "word".into(),
                    auth_ots: "https://once.test/x".into(),
                    ..Default::default()
                };
                config.set_authentication(method);
                git.config = Some(config);
            })
        };
        let basic = with(content::GitAuthMethod::BasicAuth).secrets;
        assert_eq!((basic.git_username.as_str(), basic.git_password.as_str()), ("ann", "word"));
        let none = with(content::GitAuthMethod::NoAuth).secrets;
        assert!(none.git_username.is_empty() && none.git_password.is_empty());
        assert!(none.workspace.is_some_and(|workspace| !workspace.initializer.is_empty()));
        let once = with(content::GitAuthMethod::BasicAuthOts);
        assert!(once.unfetchable.is_none() && once.secrets.git_password.is_empty());
        assert_eq!(once.secrets.git_one_time_url, "https://once.test/x");
        assert!(basic.git_one_time_url.is_empty());
        for url in ["", "file:///etc/passwd", "once.test/x"] {
            assert!(check_one_time_url(url).is_err(), "{url}");
        }
    }

    #[test]
    fn what_is_missing_is_said_as_mk3_says_it() {
        let empty = content::WorkspaceInitializer { spec: Some(Spec::Empty(content::EmptyInitializer {})) };
        let file = api::BuildSourceDockerfile { source: Some(empty), ..Default::default() };
        for (source, expected) in [
            (None, "build source is missing"),
            (Some(api::BuildSource { from: None }), "cannot resolve base image: invalid base image"),
            (
                Some(api::BuildSource { from: Some(From::File(file)) }),
                "cannot resolve base image: unsupported context initializer",
            ),
        ] {
            let status = given(source).unwrap_err();
            assert_eq!((status.code(), status.message()), (tonic::Code::InvalidArgument, expected));
        }
    }
}
