//! What ws-manager is asked to start: the workspace that image-builder-mk3 would start.

use std::collections::BTreeMap;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use kiln_domain::failure::{Failure, FailureReason};
use kiln_domain::platform::Platform;
use kiln_domain::reference::ImageReference;
use kiln_domain::run::{RunSecrets, RunSpec, Work};
use kiln_domain::source::{DockerfileSource, git_login};
use kiln_proto::contentservice as content;
use kiln_proto::contentservice::workspace_initializer::Spec;
use kiln_proto::wsman::environment_variable::SecretKeyRef;
use kiln_proto::wsman::{
    EnvironmentVariable, IdeImage, StartWorkspaceRequest, StartWorkspaceSpec, WorkspaceMetadata,
    WorkspaceType,
};
use prost::Message as _;
use secrecy::ExposeSecret as _;
use serde::Serialize;

use crate::config::Config;
use crate::state::{BASE, MANAGED_BY, TARGET};

/// Where initializers put what they fetch.
const WORKSPACE: &str = "/workspace";
/// The supervisor's tasks: it shows their output, and ends the workspace with them.
const TASKS: &str = r#"[{"name": "build", "init": "sudo -E /app/bob build"}]"#;
/// What the builder calls base and target: the proxy beside it knows their real names, and the credentials.
const LOCAL: &str = "localhost:8080";

/// The request for a run; a failure where its sources can't be read.
pub(crate) fn start(
    spec: &RunSpec,
    secrets: &RunSecrets,
    config: &Config,
) -> Result<StartWorkspaceRequest, Failure> {
    let id = spec.run.to_string();
    let (base, source) = match &spec.work {
        Work::Copy { from, .. } => (from, None),
        Work::Build { source, base_ref, .. } => (base_ref, Some(source)),
    };
    let platforms = source.map(DockerfileSource::built_for).unwrap_or_default();
    if let Some(other) = platforms.iter().find(|platform| **platform != Platform::default()) {
        let message = format!("{other} can't be built in a workspace, only {}", Platform::default());
        return Err(Failure::new(FailureReason::Dockerfile, message));
    }
    if source.is_some_and(|source| source.provenance || source.reproducible) {
        let message = "neither provenance nor reproducible images can be had of a workspace";
        return Err(Failure::new(FailureReason::Dockerfile, message));
    }
    let (dockerfile, context) = paths(source);
    let initializer = match &spec.work {
        Work::Copy { .. } => {
            content::WorkspaceInitializer { spec: Some(Spec::Empty(content::EmptyInitializer {})) }
        }
        Work::Build { source, commit, .. } => initializer(source, commit, secrets)?,
    };
    let annotations = [
        (TARGET, spec.target_ref.to_string()),
        (BASE, base.to_string()),
        (MANAGED_BY.0, MANAGED_BY.1.into()),
    ];
    let workspace = StartWorkspaceSpec {
        workspace_image: config.builder_image.clone(),
        initializer: Some(initializer),
        envvars: environment(spec, secrets, config, base, source.is_some(), &dockerfile, &context)?,
        workspace_location: context,
        timeout: go_duration(spec.timeout()),
        ide_image: Some(IdeImage {
            web_ref: config.builder_image.clone(),
            supervisor_ref: secrets
                .workspace
                .as_ref()
                .map(|given| given.supervisor_ref.clone())
                .unwrap_or_default(),
        }),
        ..Default::default()
    };
    let mut request = StartWorkspaceRequest {
        id: id.clone(),
        service_prefix: id.clone(),
        metadata: Some(WorkspaceMetadata {
            owner: spec.owner.clone(),
            meta_id: id,
            annotations: annotations.map(|(name, value)| (name.to_owned(), value)).into(),
            started_at: None,
        }),
        spec: Some(workspace),
        ..Default::default()
    };
    request.set_type(WorkspaceType::Imagebuild);
    Ok(request)
}

/// Dockerfile and context in the workspace's file system. They were checked before they came here.
fn paths(source: Option<&DockerfileSource>) -> (String, String) {
    let Some(source) = source else { return (format!("{WORKSPACE}/Dockerfile"), WORKSPACE.to_owned()) };
    let location = source.checkout_location.as_deref().unwrap_or_default();
    let within = |path: &str| {
        let parts =
            location.split('/').chain(path.split('/')).filter(|part| !part.is_empty() && *part != ".");
        std::iter::once(WORKSPACE).chain(parts).collect::<Vec<_>>().join("/")
    };
    (within(source.dockerfile()), within(source.context()))
}

/// What was asked for, whole; else, of a source of our own API, one that fetches its commit.
fn initializer(
    source: &DockerfileSource,
    commit: &str,
    secrets: &RunSecrets,
) -> Result<content::WorkspaceInitializer, Failure> {
    let given = secrets.workspace.as_ref().filter(|given| !given.initializer.expose_secret().is_empty());
    if let Some(given) = given {
        let unreadable = || Failure::new(FailureReason::Internal, "the request's initializer can't be read");
        let bytes = STANDARD.decode(given.initializer.expose_secret()).map_err(|_| unreadable())?;
        return content::WorkspaceInitializer::decode(bytes.as_slice()).map_err(|_| unreadable());
    }
    let password = secrets.git_password.as_ref().map_or("", |password| password.expose_secret());
    let mut auth = content::GitConfig::default();
    if let Some((user, password)) = git_login(&secrets.git_username, password) {
        auth.set_authentication(content::GitAuthMethod::BasicAuth);
        auth.auth_user = user.to_owned();
        auth.auth_password = password.to_owned();
    }
    let mut git = content::GitInitializer {
        remote_uri: source.remote_uri.clone(),
        clone_taget: commit.to_owned(),
        checkout_location: source.checkout_location.clone().unwrap_or_else(|| ".".into()),
        config: Some(auth),
        ..Default::default()
    };
    git.set_target_mode(content::CloneTargetMode::RemoteCommit);
    Ok(content::WorkspaceInitializer { spec: Some(Spec::Git(git)) })
}

fn environment(
    spec: &RunSpec,
    secrets: &RunSecrets,
    config: &Config,
    base: &ImageReference,
    builds_base: bool,
    dockerfile: &str,
    context: &str,
) -> Result<Vec<EnvironmentVariable>, Failure> {
    let local_base = match base.digest() {
        Some(digest) => format!("{LOCAL}/base@{digest}"),
        None => format!("{LOCAL}/base:latest"),
    };
    let additional = additional_auth(secrets, spec.target_ref.registry())?;
    let plain = [
        ("BOB_TARGET_REF", format!("{LOCAL}/target:latest")),
        ("BOB_BASE_REF", local_base),
        ("BOB_BUILD_BASE", builds_base.to_string()),
        ("BOB_DOCKERFILE_PATH", dockerfile.to_owned()),
        ("BOB_CONTEXT_DIR", context.to_owned()),
        ("GITPOD_TASKS", TASKS.to_owned()),
        ("WORKSPACEKIT_RING2_ENCLAVE", "/app/bob proxy".to_owned()),
        ("WORKSPACEKIT_BOBPROXY_BASEREF", base.to_string()),
        ("WORKSPACEKIT_BOBPROXY_TARGETREF", spec.target_ref.to_string()),
        ("WORKSPACEKIT_BOBPROXY_ADDITIONALAUTH", additional),
        ("SUPERVISOR_DEBUG_ENABLE", "false".to_owned()),
    ];
    let mut variables: Vec<_> = plain
        .into_iter()
        .map(|(name, value)| EnvironmentVariable { name: name.into(), value, secret: None })
        .collect();
    if !config.pull_secret.is_empty() {
        let secret =
            SecretKeyRef { secret_name: config.pull_secret.clone(), key: ".dockerconfigjson".into() };
        variables.push(EnvironmentVariable {
            name: "WORKSPACEKIT_BOBPROXY_AUTH".into(),
            value: String::new(),
            secret: Some(secret),
        });
    }
    Ok(variables)
}

#[derive(Serialize)]
struct Login<'a> {
    username: &'a str,
    password: &'a str,
    auth: String,
}

/// The credentials that the request may use, as Docker's configuration has them; and for the registry of base images the
/// installation's own, for it is pushed to as well. Never for the target's registry: that is the pull secret's.
fn additional_auth(secrets: &RunSecrets, target: &str) -> Result<String, Failure> {
    let logins: BTreeMap<&str, Login<'_>> = secrets
        .registries
        .iter()
        .chain(&secrets.push)
        .filter(|(host, _)| host.as_str() != target)
        .filter_map(|(host, pair)| {
            let (username, password) = pair.expose_secret().split_once(':')?;
            Some((host.as_str(), Login { username, password, auth: STANDARD.encode(pair.expose_secret()) }))
        })
        .collect();
    serde_json::to_string(&logins).map_err(|error| {
        Failure::new(FailureReason::Internal, format!("credentials can't be written: {error}"))
    })
}

/// As Go writes a duration: `1h0m0s`.
fn go_duration(duration: Duration) -> String {
    let seconds = duration.as_secs().max(1);
    format!("{}h{}m{}s", seconds / 3600, seconds / 60 % 60, seconds % 60)
}

#[cfg(test)]
mod tests {
    use kiln_domain::id::{BuildId, ImageKey, RunId};
    use kiln_domain::run::WorkspaceRequest;

    use super::*;

    fn config() -> Config {
        Config {
            address: "ws-manager:8080".into(),
            tls: None,
            builder_image: "r.test/bob:1".into(),
            pull_secret: "registry-secret".into(),
        }
    }

    fn spec(work: Work) -> RunSpec {
        let build = BuildId::new(&ImageKey::of("r.test/workspace:x"), [7; 10]);
        RunSpec {
            run: RunId::new(&build, 1),
            work,
            owner: "ann".into(),
            target_ref: "r.test/workspace:x".parse().unwrap(),
            timeout_ms: 3_600_000,
            no_cache: false,
            plain_http: Vec::new(),
            file_remotes: false,
            traceparent: String::new(),
        }
    }

    fn dockerfile(change: impl FnOnce(&mut DockerfileSource)) -> Work {
        let mut source = DockerfileSource {
            remote_uri: "https://git.test/x.git".into(),
            revision: "main".into(),
            path: "x/a/Dockerfile".into(),
            context_path: "x".into(),
            version: String::new(),
            build_args: BTreeMap::new(),
            target: String::new(),
            platform: None,
            platforms: Vec::new(),
            provenance: false,
            reproducible: false,
            checkout_location: Some("x".into()),
            unknown: Default::default(),
        };
        change(&mut source);
        Work::Build { source, commit: "c".repeat(40), base_ref: "r.test/base:y".parse().unwrap() }
    }

    fn variable<'a>(request: &'a StartWorkspaceRequest, name: &str) -> &'a EnvironmentVariable {
        let spec = request.spec.as_ref().unwrap();
        spec.envvars.iter().find(|variable| variable.name == name).unwrap()
    }

    #[test]
    fn the_workspace_is_the_one_that_mk3_starts() {
        let given = content::WorkspaceInitializer {
            spec: Some(Spec::Git(content::GitInitializer { full_clone: true, ..Default::default() })),
        };
        let secrets = RunSecrets {
            workspace: Some(WorkspaceRequest {
                initializer: STANDARD.encode(given.encode_to_vec()).into(),
                supervisor_ref: "r.test/supervisor:2".into(),
            }),
            registries: [
                ("quay.io".to_owned(), "u:p:w".into()),
                ("r.test".to_owned(), "no:one".into()),
                ("base.test".to_owned(), "ann:can't push".into()),
            ]
            .into(),
            push: [("r.test".to_owned(), "no:one".into()), ("base.test".to_owned(), "b:w".into())].into(),
            ..Default::default()
        };
        let spec = spec(dockerfile(|_| {}));
        let request = start(&spec, &secrets, &config()).unwrap();
        let metadata = request.metadata.as_ref().unwrap();
        let id = spec.run.to_string();
        assert_eq!([&request.id, &request.service_prefix, &metadata.meta_id], [&id; 3]);
        assert_eq!((request.r#type(), metadata.owner.as_str()), (WorkspaceType::Imagebuild, "ann"));
        for (name, value) in
            [("ref", "r.test/workspace:x"), ("baseref", "r.test/base:y"), ("managed-by", "image-builder")]
        {
            assert_eq!(metadata.annotations[name], value);
        }
        let workspace = request.spec.as_ref().unwrap();
        let ide = workspace.ide_image.as_ref().unwrap();
        assert_eq!(
            (ide.web_ref.as_str(), ide.supervisor_ref.as_str()),
            ("r.test/bob:1", "r.test/supervisor:2")
        );
        assert_eq!(workspace.initializer, Some(given), "passed on whole");
        assert_eq!(
            (workspace.timeout.as_str(), workspace.workspace_location.as_str()),
            ("1h0m0s", "/workspace/x")
        );
        for (name, value) in [
            ("BOB_TARGET_REF", "localhost:8080/target:latest"),
            ("BOB_BASE_REF", "localhost:8080/base:latest"),
            ("BOB_BUILD_BASE", "true"),
            ("BOB_DOCKERFILE_PATH", "/workspace/x/a/Dockerfile"),
            ("BOB_CONTEXT_DIR", "/workspace/x"),
            ("GITPOD_TASKS", r#"[{"name": "build", "init": "sudo -E /app/bob build"}]"#),
            ("WORKSPACEKIT_RING2_ENCLAVE", "/app/bob proxy"),
            ("WORKSPACEKIT_BOBPROXY_BASEREF", "r.test/base:y"),
            ("WORKSPACEKIT_BOBPROXY_TARGETREF", "r.test/workspace:x"),
            (
                "WORKSPACEKIT_BOBPROXY_ADDITIONALAUTH",
                r#"{"base.test":{"username":"b","password":"w","auth":"Yjp3"},"quay.io":{"username":"u","password":"p:w","auth":"dTpwOnc="}}"#,
            ),
        ] {
            assert_eq!(variable(&request, name).value, value, "{name}");
        }
        let auth = variable(&request, "WORKSPACEKIT_BOBPROXY_AUTH").secret.as_ref().unwrap();
        assert_eq!((auth.secret_name.as_str(), auth.key.as_str()), ("registry-secret", ".dockerconfigjson"));
    }

    #[test]
    fn an_image_is_copied_from_its_digest_with_nothing_fetched() {
        let from = format!("r.test/base@sha256:{}", "a".repeat(64));
        let work = Work::Copy { from: from.parse().unwrap(), platform: Some(Platform::default()) };
        let request = start(&spec(work), &RunSecrets::default(), &config()).unwrap();
        let expected = format!("localhost:8080/base@sha256:{}", "a".repeat(64));
        assert_eq!(variable(&request, "BOB_BASE_REF").value, expected);
        assert_eq!(variable(&request, "BOB_BUILD_BASE").value, "false");
        let initializer = request.spec.unwrap().initializer.unwrap();
        assert!(matches!(initializer.spec, Some(Spec::Empty(_))));
    }

    #[test]
    fn a_source_of_our_own_api_is_fetched_by_its_commit() {
        let secrets = RunSecrets { git_password: Some("token".to_owned().into()), ..Default::default() };
        let work = dockerfile(|source| {
            source.checkout_location = None;
            source.path = "a/Dockerfile".into();
            source.context_path = String::new();
        });
        let request = start(&spec(work), &secrets, &config()).unwrap();
        assert_eq!(variable(&request, "BOB_CONTEXT_DIR").value, "/workspace/a");
        let Some(Spec::Git(git)) = request.spec.unwrap().initializer.unwrap().spec else { panic!("git") };
        let auth = git.config.clone().unwrap();
        assert_eq!(
            (git.clone_taget.as_str(), git.checkout_location.as_str()),
            ("c".repeat(40).as_str(), ".")
        );
        assert_eq!((auth.auth_user.as_str(), auth.auth_password.as_str()), ("git", "token"));
    }
}
