//! `kiln check-config`, and what a role says of a configuration that it can't use.

use crate::running::kiln;

fn check(json: &str, arguments: &[&str], environment: &[(&str, &str)]) -> (Option<i32>, String) {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("kiln.json");
    std::fs::write(&file, json).expect("written");
    let output = kiln()
        .arg("check-config")
        .arg(&file)
        .args(arguments)
        .envs(environment.iter().copied())
        .output()
        .expect("ran");
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    (output.status.code(), text.replace(&file.display().to_string(), "FILE"))
}

#[test]
fn a_right_file_is_right() {
    let json = r#"{
        "nats": {"url": "nats://nats:4222", "user": "kiln", "password": "x"},
        "listen": {"grpc": "0.0.0.0:8080"},
        "engine": {"local": {"folder": "/srv/kiln"}},
        "orchestrator": {
            "slots": 2,
            "base_image_repository": "registry:5000/base",
            "workspace_image_repository": "registry:5000/workspace"
        },
        "resolver": {"tag_fresh_seconds": 10}
    }"#;
    assert_eq!(check(json, &[], &[]), (Some(0), String::new()));
    assert_eq!(check("{}", &[], &[("KILN_LOG", "debug"), ("KILN_ADDR", "x:1")]), (Some(0), String::new()));
}

#[test]
fn every_problem_of_a_file_is_named_by_its_key() {
    let json = r#"{
        "nats": {"url": "nats://kiln:hunter2@nats:4222"},
        "seal": {"seed": "SX", "seed_file": "/x"},
        "listen": {"grpc": "0.0.0.0:8080"},
        "holders": {"lease_seconds": 31},
        "engine": {"local": {"folder": "srv"}},
        "orchestrator": {"slots": 0, "workspace_image_repository": "registry:5000/w:tag"}
    }"#;
    let (status, text) = check(json, &[], &[("KILN_RESOLVER__GIT_AT_ONCE", "0")]);
    assert_eq!(status, Some(2));
    let keys: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix('`')?.split('`').next()).collect();
    assert_eq!(
        keys,
        [
            "nats.url",
            "seal.seed_file",
            "seal.seed",
            "holders.lease_seconds",
            "engine.local.folder",
            "resolver.git_at_once",
            "orchestrator.base_image_repository",
            "orchestrator.workspace_image_repository",
            "orchestrator.slots",
        ],
        "{text}"
    );
    assert!(text.contains("`resolver.git_at_once` (KILN_RESOLVER__GIT_AT_ONCE): "), "{text}");
    assert!(!text.contains("hunter2"), "{text}");
}

#[test]
fn keys_and_types_are_checked_and_no_value_is_shown() {
    let json = r#"{"nats": {"password": 5, "pasword": "x"}, "listen": {"grpc": "everywhere"}, "engine": {"cloud": {}}}"#;
    let (status, text) = check(json, &[], &[]);
    assert_eq!(status, Some(2));
    for expected in [
        "`engine.cloud` (FILE): expected one of local, ws_manager",
        "`listen.grpc` (FILE): invalid socket address syntax",
        "`nats.password` (FILE): expected a string, found a number",
        "`nats.pasword` (FILE): unknown key; known are url, user, password, password_file",
    ] {
        assert!(text.lines().any(|line| line == expected), "{expected}\n{text}");
    }
}

#[test]
fn what_a_role_needs_is_asked_for_by_name() {
    let (status, text) = check("{}", &["--for", "orchestrator"], &[]);
    assert_eq!(status, Some(2));
    assert!(text.starts_with("`orchestrator.base_image_repository` (FILE): "), "{text}");
}

#[test]
fn a_role_names_the_key_that_is_wrong() {
    let output =
        kiln().arg("resolver").env("KILN_NATS__URL", "").env("KILN_RESOLVER__GIT", "").output().expect("ran");
    assert_eq!(output.status.code(), Some(1));
    let message = String::from_utf8(output.stderr).expect("UTF-8");
    assert!(message.contains("`nats.url` (KILN_NATS__URL): is empty"), "{message}");
    assert!(message.contains("`resolver.git` (KILN_RESOLVER__GIT)"), "{message}");
}

#[test]
fn a_file_of_image_builder_mk3_is_known_as_one_and_its_keys_keep_their_names() {
    let json = r#"{
        "orchestrator": {
            "wsman": {"address": "ws-manager:8080", "colour": "red"},
            "baseImageRepository": "registry.test/base",
            "workspaceImageRepository": "registry.test/workspace",
            "builderImage": "registry.test/bob:1",
            "slots": 7
        },
        "refCache": {"interval": "6h"},
        "nats": {"url": "nats://nats:4222"}
    }"#;
    let (status, text) = check(json, &["--for", "orchestrator"], &[]);
    assert_eq!(status, Some(0), "{text}");
    let mut named: Vec<&str> =
        text.lines().filter_map(|line| line.strip_prefix('`')?.split('`').next()).collect();
    named.sort_unstable();
    assert_eq!(named, ["orchestrator.wsman.colour", "refCache.interval"], "{text}");

    let json = r#"{
        "orchestrator": {
            "wsman": {"address": "ws-manager:8080", "tls": {"crt": "/tls.crt"}},
            "workspaceImageRepository": 5,
            "builderImage": "registry.test/bob:1",
            "slots": "many"
        }
    }"#;
    let (status, text) = check(json, &[], &[("KILN_NATS__COLOUR", "red")]);
    assert_eq!(status, Some(2));
    for expected in [
        "`orchestrator.wsman.tls.ca` (FILE): missing",
        "`orchestrator.workspaceImageRepository` (FILE): expected a string, found a number",
        "`orchestrator.slots` (FILE): expected usize, found a string",
        // A variable is not the other program's.
        "`nats.colour` (KILN_NATS__COLOUR): unknown key; known are url, user, password, password_file",
    ] {
        assert!(text.lines().any(|line| line == expected), "{expected}\n{text}");
    }
}
