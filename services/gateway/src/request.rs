//! Checking what a client sends. Every error names the field as the API does.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use kiln_contract::secrets::{RegistryAuth, Secrets};
use kiln_domain::id::BuildId;
use kiln_domain::limits;
use kiln_domain::platform::Platform;
use kiln_domain::source::{DockerfileSource, Source, check_text};
use kiln_proto::kiln_v1 as api;
use tonic::Status;

use crate::status::invalid;

/// A build's id.
pub(crate) fn build_id(id: &str) -> Result<BuildId, Status> {
    id.parse().map_err(|error| invalid("id", error))
}

/// The source, and the git credentials that come with it.
pub(crate) fn source(source: Option<api::Source>, file_remotes: bool) -> Result<(Source, Secrets), Status> {
    let from =
        source.and_then(|source| source.from).ok_or_else(|| invalid("source", "build source is missing"))?;
    match from {
        api::source::From::Image(reference) => {
            let reference = reference.parse().map_err(|error| invalid("source.image", error))?;
            Ok((Source::Image(reference), Secrets::default()))
        }
        api::source::From::Dockerfile(dockerfile) => {
            let git = dockerfile.git.ok_or_else(|| invalid("source.dockerfile.git", "is missing"))?;
            let source = DockerfileSource {
                remote_uri: git.remote_uri,
                revision: git.revision,
                path: dockerfile.path,
                context_path: dockerfile.context_path,
                version: dockerfile.version,
                build_args: dockerfile.build_args.into_iter().collect(),
                target: dockerfile.target,
                provenance: dockerfile.provenance,
                reproducible: dockerfile.reproducible,
                ..DockerfileSource::default()
            };
            let source = source.for_platforms(platforms(&dockerfile.platforms)?);
            source.check(file_remotes).map_err(|error| Status::invalid_argument(error.to_string()))?;
            check_text("source.dockerfile.git.username", &git.username)
                .map_err(|error| Status::invalid_argument(error.to_string()))?;
            if git.password.len() > limits::REQUEST_BYTES || git.password.contains(['\0', '\n', '\r']) {
                return Err(invalid("source.dockerfile.git.password", "is too long or contains a line end"));
            }
            if (!git.username.is_empty() || !git.password.is_empty())
                && !source.remote_uri.starts_with("http")
            {
                return Err(invalid(
                    "source.dockerfile.git.username",
                    "credentials are for http and https remotes",
                ));
            }
            let secrets =
                Secrets { git_username: git.username, git_password: git.password, ..Secrets::default() };
            Ok((Source::Dockerfile(source), secrets))
        }
    }
}

/// What is to be built for; whether the installation can is its builders' to say.
fn platforms(platforms: &[String]) -> Result<Vec<Platform>, Status> {
    const FIELD: &str = "source.dockerfile.platforms";
    if platforms.len() > limits::PLATFORMS {
        return Err(invalid(FIELD, format!("may be at most {}", limits::PLATFORMS)));
    }
    platforms.iter().map(|one| one.parse().map_err(|error| invalid(FIELD, error))).collect()
}

/// Which registry credentials the request may use.
pub(crate) fn registry_auth(auth: Option<api::RegistryAuth>) -> Result<RegistryAuth, Status> {
    let auth = auth.unwrap_or_default();
    let mut credentials = BTreeMap::new();
    for (host, pair) in auth.credentials {
        check_host("auth.credentials", &host)?;
        let pair = base64::engine::general_purpose::STANDARD
            .decode(pair)
            .ok()
            .and_then(|pair| String::from_utf8(pair).ok())
            .filter(|pair| pair.contains(':') && !pair.contains(['\0', '\n', '\r']))
            .ok_or_else(|| {
                invalid("auth.credentials", format!("of {host} must be base64 of username:password"))
            })?;
        credentials.insert(host, pair);
    }
    for host in &auth.allowed_hosts {
        check_host("auth.allowed_hosts", host)?;
    }
    Ok(RegistryAuth { allow_all: auth.allow_all, allowed_hosts: auth.allowed_hosts, credentials })
}

fn check_host(field: &str, host: &str) -> Result<(), Status> {
    let fits = (1..=255).contains(&host.len())
        && host.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._:[]/".contains(&b));
    if fits { Ok(()) } else { Err(invalid(field, "a key must be a registry's host[:port]")) }
}

/// Build secrets, id → base64.
pub(crate) fn mounts(secrets: HashMap<String, Vec<u8>>) -> BTreeMap<String, String> {
    secrets.into_iter().map(|(id, content)| (id, STANDARD.encode(content))).collect()
}

/// Everything of a request to build that isn't its source, checked.
pub(crate) fn check_build(request: &api::BuildImageRequest) -> Result<(), Status> {
    let from = request.source.as_ref().and_then(|source| source.from.as_ref());
    if !request.secrets.is_empty() && matches!(from, Some(api::source::From::Image(_))) {
        return Err(invalid("secrets", "only a Dockerfile takes secrets: an image is copied as it is"));
    }
    let is_id = |id: &str| {
        (1..=255).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b))
    };
    if !request.secrets.keys().all(|id| is_id(id)) {
        return Err(invalid("secrets", "an id must be letters, digits, '_', '.' and '-'"));
    }
    let secrets: usize = request.secrets.values().map(Vec::len).sum();
    if secrets > limits::REQUEST_BYTES {
        let problem = format!("have {secrets} bytes, more than the {} allowed", limits::REQUEST_BYTES);
        return Err(invalid("secrets", problem));
    }
    check_text("owner", &request.owner).map_err(|error| Status::invalid_argument(error.to_string()))?;
    for (key, value) in &request.labels {
        let fits = !key.is_empty() && !key.chars().chain(value.chars()).any(char::is_control);
        if !fits {
            return Err(invalid(
                "labels",
                "a key must not be empty, and no control character may stand in them",
            ));
        }
    }
    let sizes = |map: &mut dyn Iterator<Item = (&String, &String)>| {
        map.map(|(k, v)| k.len() + v.len()).sum::<usize>()
    };
    let labels = sizes(&mut request.labels.iter());
    let args = match request.source.as_ref().and_then(|source| source.from.as_ref()) {
        Some(api::source::From::Dockerfile(dockerfile)) => sizes(&mut dockerfile.build_args.iter()),
        _ => 0,
    };
    if labels + args > limits::REQUEST_BYTES {
        let field = if labels > args { "labels" } else { "source.dockerfile.build_args" };
        let problem = format!(
            "labels and build args have {} bytes, more than the {} allowed",
            labels + args,
            limits::REQUEST_BYTES
        );
        return Err(invalid(field, problem));
    }
    Ok(())
}

/// A timeout in milliseconds; 0 for the service's default.
pub(crate) fn timeout_ms(timeout: Option<prost_types::Duration>) -> Result<u64, Status> {
    let Some(timeout) = timeout else { return Ok(0) };
    let timeout = Duration::try_from(timeout).map_err(|_| invalid("timeout", "must not be negative"))?;
    if timeout.is_zero() || timeout > limits::LONGEST {
        return Err(invalid("timeout", format!("must be above zero and at most {:?}", limits::LONGEST)));
    }
    Ok(u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX).max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dockerfile(remote: &str) -> api::Source {
        let git = api::GitContext { remote_uri: remote.into(), ..Default::default() };
        let dockerfile = api::Dockerfile { git: Some(git), ..Default::default() };
        api::Source { from: Some(api::source::From::Dockerfile(dockerfile)) }
    }

    #[test]
    fn what_is_wrong_is_named() {
        let image = |text: &str| api::Source { from: Some(api::source::From::Image(text.into())) };
        for (given, expected) in [
            (None, "source: build source is missing"),
            (Some(api::Source { from: None }), "source: build source is missing"),
            (Some(image("UPPER/x")), "source.image: cannot parse image ref"),
            (Some(image("a//b")), "source.image: cannot parse image ref"),
            (Some(dockerfile("")), "source.dockerfile.git.remote_uri: is missing"),
            (Some(dockerfile("--upload-pack=x")), "source.dockerfile.git.remote_uri: must be a URL"),
            (Some(dockerfile("ext::sh -c x")), "source.dockerfile.git.remote_uri: must be a URL"),
            (Some(dockerfile("file:///etc")), "source.dockerfile.git.remote_uri: file:// is not admitted"),
        ] {
            let status = source(given, false).unwrap_err();
            assert_eq!(status.code(), tonic::Code::InvalidArgument);
            assert!(status.message().starts_with(expected), "{}", status.message());
        }
        assert!(source(Some(dockerfile("file:///srv/x")), true).is_ok());
    }

    #[test]
    fn build_secrets() {
        let check = |id: &str, content: Vec<u8>, from| {
            let secrets = [(id.to_owned(), content)].into();
            let source = Some(api::Source { from: Some(from) });
            check_build(&api::BuildImageRequest { secrets, source, ..Default::default() })
        };
        let dockerfile = || api::source::From::Dockerfile(Default::default());
        assert!(check("npm.token_1-a", b"x".to_vec(), dockerfile()).is_ok());
        for (id, content, from) in [
            ("", b"x".to_vec(), dockerfile()),
            ("a,src=/etc/shadow", b"x".to_vec(), dockerfile()),
            ("../x", b"x".to_vec(), dockerfile()),
            ("a", vec![0; limits::REQUEST_BYTES + 1], dockerfile()),
            ("a", b"x".to_vec(), api::source::From::Image("x".into())),
        ] {
            assert!(check(id, content, from).unwrap_err().message().starts_with("secrets: "), "{id}");
        }
    }

    #[test]
    fn platforms_are_a_set() {
        let of = |names: &[&str]| {
            let names: Vec<_> = names.iter().map(ToString::to_string).collect();
            platforms(&names).map(|platforms| DockerfileSource::default().for_platforms(platforms))
        };
        for default in [&[] as &[&str], &["linux/amd64"], &["linux/amd64", "linux/amd64"]] {
            assert_eq!(of(default).unwrap(), DockerfileSource::default());
        }
        let several = of(&["linux/arm64", "linux/amd64", "linux/arm64"]).unwrap();
        assert_eq!(several, of(&["linux/amd64", "linux/arm64"]).unwrap());
        assert_eq!(several.built_for().len(), 2);
        assert_eq!(of(&["linux/arm64"]).unwrap().built_for(), ["linux/arm64".parse().unwrap()]);
        let error = of(&["arm64"]).unwrap_err();
        assert!(error.message().starts_with("source.dockerfile.platforms: `arm64`"), "{error}");
        assert!(of(&["linux/amd64"; limits::PLATFORMS + 1]).is_err());
    }

    #[test]
    fn limits_are_kept() {
        let labels = [("k".to_owned(), "v".repeat(limits::REQUEST_BYTES))].into();
        let request = api::BuildImageRequest { labels, ..Default::default() };
        assert!(check_build(&request).unwrap_err().message().starts_with("labels: "));
        for (seconds, nanos) in [(0, 0), (-1, 0), (86_401, 0)] {
            assert!(timeout_ms(Some(prost_types::Duration { seconds, nanos })).is_err(), "{seconds}");
        }
        assert_eq!(timeout_ms(Some(prost_types::Duration { seconds: 1, nanos: 0 })).unwrap(), 1000);
    }

    #[test]
    fn a_password_may_hold_a_colon_and_no_line_end() {
        let auth = |pair: &str| api::RegistryAuth {
            credentials: [(
                "r.example:5000".to_owned(),
                base64::engine::general_purpose::STANDARD.encode(pair),
            )]
            .into(),
            ..Default::default()
        };
        let taken = registry_auth(Some(auth("user:pass:word"))).unwrap();
        assert_eq!(taken.credentials["r.example:5000"], "user:pass:word");
        for pair in ["nothing", "u:p\nx"] {
            let message = registry_auth(Some(auth(pair))).unwrap_err().message().to_owned();
            assert!(message.starts_with("auth.credentials: ") && !message.contains(pair), "{message}");
        }
    }
}
