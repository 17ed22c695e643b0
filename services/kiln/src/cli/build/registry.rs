//! Which registry credentials a request may use.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use kiln_proto::kiln_v1::RegistryAuth;
use serde::Deserialize;

use super::super::failure::Failure;

/// Options of every command whose question reaches a registry.
#[derive(Debug, Clone, clap::Args)]
pub(in crate::cli) struct RegistryArgs {
    /// Registry credentials of your own: a Docker config.json
    #[arg(long, value_name = "FILE")]
    registry_auth_file: Option<PathBuf>,
    /// Let the installation's credentials be used for this registry; may be given several times
    #[arg(long = "allow-registry", value_name = "HOST", conflicts_with = "allow_all_registries")]
    allowed_registries: Vec<String>,
    /// Let the installation's credentials be used for every registry
    #[arg(long)]
    allow_all_registries: bool,
}

impl RegistryArgs {
    /// The message's form; none when no option was given.
    pub(in crate::cli) fn auth(&self) -> Result<Option<RegistryAuth>, Failure> {
        let auth = RegistryAuth {
            allow_all: self.allow_all_registries,
            allowed_hosts: self.allowed_registries.clone(),
            credentials: self.registry_auth_file.as_deref().map(credentials).transpose()?.unwrap_or_default(),
        };
        Ok((auth != RegistryAuth::default()).then_some(auth))
    }
}

#[derive(Deserialize)]
struct DockerConfig {
    #[serde(default)]
    auths: BTreeMap<String, Entry>,
}

#[derive(Deserialize)]
struct Entry {
    auth: Option<String>,
    username: Option<String>,
    password: Option<String>,
}

fn credentials(file: &Path) -> Result<HashMap<String, String>, Failure> {
    let refuse =
        |why: &str| Failure::Request(format!("can't use {} for registry credentials: {why}", file.display()));
    let text = std::fs::read_to_string(file).map_err(|error| refuse(&error.to_string()))?;
    let credentials = parse(&text).map_err(refuse)?;
    if credentials.is_empty() {
        return Err(refuse("there are none in it (those of a credential helper can't be read)"));
    }
    Ok(credentials)
}

/// Registry host to base64("username:password"). No error of this quotes the text, which holds secrets.
fn parse(text: &str) -> Result<HashMap<String, String>, &'static str> {
    let config: DockerConfig = serde_json::from_str(text).map_err(|_| "it is not a Docker config.json")?;
    let usable = config.auths.into_iter().filter_map(|(key, entry)| {
        let credential = match entry {
            Entry { auth: Some(auth), .. } if !auth.is_empty() => auth,
            Entry { username: Some(username), password: Some(password), .. } => {
                STANDARD.encode(format!("{username}:{password}"))
            }
            Entry { .. } => return None,
        };
        Some((host(&key).to_owned(), credential))
    });
    Ok(usable.collect())
}

/// A key is a host, or, in old files, a URL: Docker Hub's is `https://index.docker.io/v1/`.
fn host(key: &str) -> &str {
    let rest = key.split_once("://").map_or(key, |(_, rest)| rest);
    match rest.split('/').next().unwrap_or(rest) {
        "index.docker.io" | "registry-1.docker.io" => "docker.io",
        host => host,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_docker_config_is_read() {
        let read = parse(
            r#"{"auths":{"https://index.docker.io/v1/":{"auth":"YTpi"},"host:5000":{"username":"u","password":"p"},
                "helped.example.com":{}},"credsStore":"pass"}"#,
        );
        let expected = [("docker.io", "YTpi"), ("host:5000", "dTpw")];
        assert_eq!(read.unwrap(), expected.map(|(host, auth)| (host.to_owned(), auth.to_owned())).into());
        assert_eq!(parse("{}").unwrap(), HashMap::new());
        assert_eq!(parse("secret").unwrap_err(), "it is not a Docker config.json");
    }
}
