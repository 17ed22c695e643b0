//! The configuration file of Gitpod's image-builder-mk3, taken as it is: what it says in Kiln's own keys. Kiln's own may stand
//! in the same file, and go before what was mk3's. What has no meaning here is named, and refused never: the file is
//! another program's.

use std::net::{AddrParseError, SocketAddr};

use anyhow::Context as _;
use serde_json::{Map, Value};

/// What such a file says.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Translated {
    pub(crate) keys: Map<String, Value>,
    /// A line for each of mk3's keys that means nothing here.
    pub(crate) ignored: Vec<String>,
    /// What the file says in our keys itself.
    own: Value,
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

/// Whether a file is mk3's: no key of it is one of ours, so one is enough.
pub(crate) fn is_mk3s(keys: &Map<String, Value>) -> bool {
    let has = |key: &str| {
        let (first, rest) = key.split_once('.').unwrap_or((key, ""));
        keys.get(first).is_some_and(|value| value.pointer(&pointer(rest)).is_some())
    };
    let theirs = KEYS.iter().map(|(theirs, _)| *theirs);
    ["server", "refCache"].iter().any(|section| keys.contains_key(*section))
        || theirs.chain(WITHOUT_MEANING.map(|(theirs, _)| theirs)).chain([ECR]).any(has)
        // A section that has lost its address is to be told of that.
        || keys.get("orchestrator").is_some_and(|orchestrator| orchestrator.get("wsman").is_some())
}

/// What it says. The error names what of it can't be used.
pub(crate) fn translate(file: Map<String, Value>) -> anyhow::Result<Translated> {
    let mut file = Value::Object(file);
    let (mut keys, mut ignored) = (Map::new(), Vec::new());
    for (theirs, ours) in KEYS {
        if let Some(value) = take(&mut file, theirs) {
            put(&mut keys, ours, value);
        }
    }
    if take(&mut file, ECR).is_some() {
        put(&mut keys, "credentials.ecr", Value::Object(Map::new()));
    }
    // Without a ws-manager builders are this host's, and need no image.
    let has_ws_manager =
        keys.get("engine").and_then(|engine| engine.pointer("/ws_manager/address")).is_some();
    if !has_ws_manager && keys.remove("engine").is_some() {
        ignored.push(
            "`orchestrator.builderImage` and `pullSecret` have no meaning without `orchestrator.wsman.address`"
                .into(),
        );
    }
    if has_ws_manager {
        // A workspace takes nothing of this process's host: mk3 had no bound at all.
        put(&mut keys, "orchestrator.slots", Value::from(WORKSPACES));
    }
    let mut grpc = None;
    if let Some(address) = take(&mut file, ADDRESS) {
        let address = address.as_str().with_context(|| format!("`{ADDRESS}`: expected a string"))?;
        let address = socket_address(address).with_context(|| format!("`{ADDRESS}`: `{address}` is none"))?;
        put(&mut keys, "listen.grpc", Value::from(address.to_string()));
        grpc = Some(address);
    }
    for (key, why) in WITHOUT_MEANING {
        if take(&mut file, key).is_some() {
            ignored.push(format!("`{key}` has no meaning here: {why}"));
        }
    }
    let mut keys = Value::Object(keys);
    lay_over(&mut keys, file.clone());
    let Value::Object(keys) = keys else { return Ok(Translated::default()) };
    Ok(Translated { keys, ignored, own: file, grpc })
}

impl Translated {
    /// mk3's name of a key of ours, unless the file has it by ours.
    pub(crate) fn name_of(&self, ours: &str) -> Option<&'static str> {
        let is_own = self.own.pointer(&pointer(ours)).is_some();
        KEYS.iter().find(|(_, name)| *name == ours && !is_own).map(|(theirs, _)| *theirs)
    }
}

fn pointer(key: &str) -> String {
    format!("/{}", key.replace('.', "/"))
}

/// As Go listens: `:8080` on every address, `localhost` by its number.
fn socket_address(address: &str) -> Result<SocketAddr, AddrParseError> {
    match address.rsplit_once(':') {
        Some(("", port)) => format!("[::]:{port}").parse(),
        Some(("localhost", port)) => format!("127.0.0.1:{port}").parse(),
        _ => address.parse(),
    }
}

/// Takes a key's value out, and the objects around it that are empty then. One that is null or an empty text, as Go writes
/// what was never set, is none.
fn take(file: &mut Value, key: &str) -> Option<Value> {
    let object = file.as_object_mut()?;
    let value = match key.split_once('.') {
        None => object.remove(key)?,
        Some((first, rest)) => {
            let inner = object.get_mut(first)?;
            let value = take(inner, rest);
            if inner.as_object().is_some_and(Map::is_empty) {
                object.remove(first);
            }
            value?
        }
    };
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

/// Lays `upper` over `lower`, key by key.
fn lay_over(lower: &mut Value, upper: Value) {
    match (lower, upper) {
        (Value::Object(lower), Value::Object(upper)) => {
            for (name, value) in upper {
                lay_over(lower.entry(name).or_insert(Value::Null), value);
            }
        }
        (lower, upper) => *lower = upper,
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

    fn translated(file: Value) -> Translated {
        let Value::Object(keys) = file else { panic!("{file}") };
        assert!(is_mk3s(&keys));
        translate(keys).unwrap()
    }

    #[test]
    fn a_whole_file_in_our_keys() {
        let translated = translated(file());
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
        assert_eq!(translated.grpc, Some("[::]:8080".parse().unwrap()));
        assert_eq!(translated.name_of("engine.ws_manager.builder_image"), Some("orchestrator.builderImage"));
        assert_eq!(translated.name_of("gateway.tls.key"), Some("server.services.grpc.tls.keyPath"));
        assert_eq!(translated.name_of("nats.url"), None);
        // What was never set is not spoken of; a value is not shown.
        assert_eq!(translated.ignored.len(), 1, "{:?}", translated.ignored);
        let [interval] = &translated.ignored[..] else { panic!("{:?}", translated.ignored) };
        assert!(interval.starts_with("`refCache.interval` ") && !interval.contains("6h0m0s"), "{interval}");
        assert_eq!(Value::Object(translated.keys), expected);
    }

    #[test]
    fn tokens_of_amazons_registries_are_fetched_where_the_file_says_so() {
        let mut file = file();
        file["orchestrator"]["enableAdditionalECRAuth"] = json!(true);
        assert_eq!(translated(file).keys["credentials"]["ecr"], json!({}));
    }

    #[test]
    fn our_own_keys_in_the_file_go_before_its_own_and_what_is_unknown_stays() {
        let mut file = file();
        file["orchestrator"]["slots"] = json!(3);
        file["orchestrator"]["futureKey"] = json!(1);
        file["nats"] = json!({"url": "nats://nats:4222"});
        file["listen"] = json!({"health": "0.0.0.0:9501"});
        let keys = translated(file).keys;
        assert_eq!(
            (&keys["orchestrator"]["slots"], &keys["orchestrator"]["futureKey"]),
            (&json!(3), &json!(1))
        );
        assert_eq!(keys["listen"], json!({"grpc": "[::]:8080", "health": "0.0.0.0:9501"}));
        assert_eq!(keys["nats"]["url"], "nats://nats:4222");
        assert!(!keys.contains_key("server") && !keys.contains_key("refCache"), "{keys:?}");
    }

    #[test]
    fn a_file_is_known_by_any_key_of_mk3s() {
        let is = |file: Value| is_mk3s(file.as_object().unwrap());
        for file in [
            json!({"server": {}}),
            json!({"refCache": {"refs": []}}),
            json!({"orchestrator": {"wsman": {}}}),
            json!({"orchestrator": {"baseImageRepository": "x"}, "nats": {}}),
            json!({"orchestrator": {"enableAdditionalECRAuth": false}}),
        ] {
            assert!(is(file.clone()), "{file}");
        }
        for file in
            [json!({}), json!({"orchestrator": {"base_image_repository": "x"}, "nats": {}}), json!({"x": 1})]
        {
            assert!(!is(file.clone()), "{file}");
        }
    }

    #[test]
    fn an_address_that_is_none_is_named() {
        for address in [json!(1), json!("nowhere")] {
            let file = json!({"server": {"services": {"grpc": {"address": address}}}});
            let error = translate(file.as_object().unwrap().clone()).unwrap_err();
            assert!(error.to_string().starts_with("`server.services.grpc.address`: "), "{error}");
        }
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
