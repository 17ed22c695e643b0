//! The configuration file of Gitpod's image-builder-mk3, taken as it is: what it says in Kiln's own keys, which lie beneath
//! those of Kiln's own file. What has no meaning here is named, and refused never: the file is another program's.

use std::net::{AddrParseError, SocketAddr};
use std::path::Path;

use anyhow::Context as _;
use kiln_chassis::config::Error;
use kiln_domain::reference::ImageReference;
use serde_json::{Map, Value};

/// What such a file says.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Layer {
    pub(crate) keys: Map<String, Value>,
    /// Where its images lie.
    pub(crate) registry: Option<String>,
    /// Where it listened.
    pub(crate) grpc: Option<SocketAddr>,
}

/// mk3's key, and ours.
const KEYS: [(&str, &str); 13] = [
    ("orchestrator.baseImageRepository", "orchestrator.base_image_repository"),
    ("orchestrator.workspaceImageRepository", "orchestrator.workspace_image_repository"),
    ("orchestrator.wsman.address", "engine.ws_manager.address"),
    ("orchestrator.wsman.tls.ca", "engine.ws_manager.tls.ca"),
    ("orchestrator.wsman.tls.crt", "engine.ws_manager.tls.crt"),
    ("orchestrator.wsman.tls.key", "engine.ws_manager.tls.key"),
    ("orchestrator.builderImage", "engine.ws_manager.builder_image"),
    ("orchestrator.pullSecret", "engine.ws_manager.pull_secret"),
    ("orchestrator.pullSecretFile", "credentials.docker_config"),
    ("refCache.refs", "cache_warmer.refs"),
    ("server.services.grpc.tls.certPath", "gateway.tls.certificate"),
    ("server.services.grpc.tls.keyPath", "gateway.tls.key"),
    ("server.services.grpc.tls.caPath", "gateway.tls.client_ca"),
];

/// Whether Amazon's registries are spoken to with tokens of this process's identity: `true` there, a section here.
const ECR: &str = "orchestrator.enableAdditionalECRAuth";

/// How many workspaces an orchestrator has at once.
const WORKSPACES: u32 = 400;

const ADDRESS: &str = "server.services.grpc.address";

/// Keys of mk3 that mean nothing here, and why not.
const WITHOUT_MEANING: [(&str, &str); 3] = [
    ("refCache.interval", "references are kept younger than `cache_warmer.keep_younger_than_seconds`"),
    ("orchestrator.subassemblyBucketName", "no subassemblies are made, as mk3 made none"),
    ("orchestrator.subassemblyBucketPrefix", "no subassemblies are made, as mk3 made none"),
];

/// Reads a file, and logs what of it means nothing here. Without a file it is empty.
pub(crate) fn read(path: Option<&Path>) -> anyhow::Result<Layer> {
    let Some(path) = path else { return Ok(Layer::default()) };
    let text = std::fs::read_to_string(path)
        .map_err(|source| Error::Unreadable { path: path.to_owned(), source })?;
    let file: Value =
        serde_json::from_str(&text).map_err(|source| Error::NotJson { path: path.to_owned(), source })?;
    if !file.is_object() {
        return Err(Error::NotAnObject { path: path.to_owned() }.into());
    }
    let (layer, ignored) =
        translate(file).with_context(|| format!("the configuration file {}", path.display()))?;
    for line in ignored {
        tracing::warn!("{}: {line}", path.display());
    }
    Ok(layer)
}

/// What it says, and a line for each of its keys that says nothing.
fn translate(mut file: Value) -> anyhow::Result<(Layer, Vec<String>)> {
    let mut layer = Layer::default();
    for (theirs, ours) in KEYS {
        if let Some(value) = take(&mut file, theirs) {
            put(&mut layer.keys, ours, value);
        }
    }
    if take(&mut file, ECR).is_some() {
        put(&mut layer.keys, "credentials.ecr", Value::Object(Map::new()));
    }
    let mut ignored = Vec::new();
    // Without a ws-manager builders are this host's, and need no image.
    let has_ws_manager =
        layer.keys.get("engine").and_then(|engine| engine.pointer("/ws_manager/address")).is_some();
    if !has_ws_manager && layer.keys.remove("engine").is_some() {
        ignored.push(
            "`orchestrator.builderImage` and `pullSecret` have no meaning without `orchestrator.wsman`"
                .into(),
        );
    }
    if has_ws_manager {
        // A workspace takes nothing of this process's host: mk3 had no bound at all.
        put(&mut layer.keys, "orchestrator.slots", Value::from(WORKSPACES));
    }
    if let Some(address) = take(&mut file, ADDRESS) {
        let address = address.as_str().with_context(|| format!("`{ADDRESS}`: expected a string"))?;
        let address = socket_address(address).with_context(|| format!("`{ADDRESS}`: `{address}` is none"))?;
        put(&mut layer.keys, "listen.grpc", Value::from(address.to_string()));
        layer.grpc = Some(address);
    }
    layer.registry = ["base_image_repository", "workspace_image_repository"]
        .iter()
        .filter_map(|key| layer.keys.get("orchestrator")?.get(key)?.as_str()?.parse::<ImageReference>().ok())
        .map(|reference| reference.registry().to_owned())
        .next();
    for (key, why) in WITHOUT_MEANING {
        if take(&mut file, key).is_some() {
            ignored.push(format!("`{key}` has no meaning here: {why}"));
        }
    }
    let mut left = Vec::new();
    leaves(&file, String::new(), &mut left);
    ignored.extend(left.into_iter().map(|key| format!("`{key}` is not known here and has no effect")));
    Ok((layer, ignored))
}

/// As Go listens: `:8080` on every address, `localhost` by its number.
fn socket_address(address: &str) -> Result<SocketAddr, AddrParseError> {
    match address.rsplit_once(':') {
        Some(("", port)) => format!("[::]:{port}").parse(),
        Some(("localhost", port)) => format!("127.0.0.1:{port}").parse(),
        _ => address.parse(),
    }
}

/// Takes a key's value out. One that is null or an empty text, as Go writes what was never set, is none.
fn take(file: &mut Value, key: &str) -> Option<Value> {
    let (parents, last) = key.rsplit_once('.').unwrap_or(("", key));
    let parent =
        parents.split('.').filter(|name| !name.is_empty()).try_fold(file, |at, name| at.get_mut(name))?;
    let value = parent.as_object_mut()?.remove(last)?;
    let is_unset = value.is_null() || value == "" || value == false;
    (!is_unset).then_some(value)
}

fn put(keys: &mut Map<String, Value>, key: &str, value: Value) {
    match key.split_once('.') {
        None => {
            keys.insert(key.to_owned(), value);
        }
        Some((first, rest)) => {
            let inner = keys.entry(first).or_insert_with(|| Value::Object(Map::new()));
            if let Value::Object(inner) = inner {
                put(inner, rest, value);
            }
        }
    }
}

/// The dotted keys of all that is left. Values aren't shown: they may be secrets.
fn leaves(value: &Value, at: String, left: &mut Vec<String>) {
    match value {
        Value::Object(object) => {
            for (name, value) in object {
                leaves(value, if at.is_empty() { name.clone() } else { format!("{at}.{name}") }, left);
            }
        }
        _ => left.push(at),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// As its Helm chart writes it.
    fn file() -> Value {
        json!({
            "orchestrator": {
                "wsman": {
                    "address": "ws-manager-mk2:8080",
                    "tls": {"ca": "/wsman-certs/ca.crt", "crt": "/wsman-certs/tls.crt", "key": "/wsman-certs/tls.key"}
                },
                "pullSecret": "image-builder-registry-secret",
                "pullSecretFile": "/config/pull-secret.json",
                "baseImageRepository": "eu.gcr.io/gitpod/base-images",
                "workspaceImageRepository": "eu.gcr.io/gitpod/workspace-images",
                "builderImage": "eu.gcr.io/gitpod/bob:1",
                "enableAdditionalECRAuth": false,
                "subassemblyBucketName": "",
            },
            "refCache": {"interval": "6h0m0s", "refs": ["gitpod/workspace-full:latest"]},
            "server": {
                "services": {
                    "grpc": {
                        "address": ":8080",
                        "tls": {"caPath": "/certs/ca.crt", "certPath": "/certs/tls.crt", "keyPath": "/certs/tls.key"}
                    }
                }
            }
        })
    }

    #[test]
    fn a_whole_file_in_our_keys() {
        let (layer, ignored) = translate(file()).unwrap();
        let expected = json!({
            "orchestrator": {
                "base_image_repository": "eu.gcr.io/gitpod/base-images",
                "workspace_image_repository": "eu.gcr.io/gitpod/workspace-images",
                "slots": 400
            },
            "credentials": {"docker_config": "/config/pull-secret.json"},
            "engine": {
                "ws_manager": {
                    "address": "ws-manager-mk2:8080",
                    "tls": {"ca": "/wsman-certs/ca.crt", "crt": "/wsman-certs/tls.crt", "key": "/wsman-certs/tls.key"},
                    "builder_image": "eu.gcr.io/gitpod/bob:1",
                    "pull_secret": "image-builder-registry-secret"
                }
            },
            "cache_warmer": {"refs": ["gitpod/workspace-full:latest"]},
            "listen": {"grpc": "[::]:8080"},
            "gateway": {
                "tls": {"certificate": "/certs/tls.crt", "key": "/certs/tls.key", "client_ca": "/certs/ca.crt"}
            }
        });
        assert_eq!(Value::Object(layer.keys), expected);
        assert_eq!(layer.registry.as_deref(), Some("eu.gcr.io"));
        // What was never set is not spoken of.
        assert!(
            !ignored.iter().any(|line| line.contains("ubassembly") || line.contains("ECR")),
            "{ignored:?}"
        );
        assert!(ignored.iter().any(|line| line.contains("`refCache.interval`")), "{ignored:?}");
        assert!(!format!("{ignored:?}").contains("6h0m0s"), "a value is shown");
    }

    #[test]
    fn tokens_of_amazons_registries_are_fetched_where_the_file_says_so() {
        let mut file = file();
        file["orchestrator"]["enableAdditionalECRAuth"] = json!(true);
        let (layer, ignored) = translate(file).unwrap();
        assert_eq!(layer.keys["credentials"]["ecr"], json!({}));
        assert!(!ignored.iter().any(|line| line.contains("ECR")), "{ignored:?}");
    }

    #[test]
    fn what_is_unknown_is_named_and_not_refused() {
        let (layer, ignored) =
            translate(json!({"colour": {"of": "red"}, "server": {"debug": {"port": 1}}})).unwrap();
        assert_eq!(layer, Layer::default());
        assert_eq!(
            ignored,
            [
                "`colour.of` is not known here and has no effect",
                "`server.debug.port` is not known here and has no effect"
            ]
        );
        assert!(translate(json!({"server": {"services": {"grpc": {"address": 1}}}})).is_err());
    }

    #[test]
    fn go_listens_on_addresses_that_are_no_socket_addresses() {
        for (theirs, ours) in
            [(":8080", "[::]:8080"), ("localhost:1", "127.0.0.1:1"), ("0.0.0.0:2", "0.0.0.0:2")]
        {
            assert_eq!(socket_address(theirs).unwrap().to_string(), ours);
        }
    }
}
