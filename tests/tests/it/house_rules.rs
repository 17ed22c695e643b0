//! The rules of the house that no compiler knows: who may use whom, where a subject may be spelled, how large a file
//! may grow. A rule that has to be broken is broken here, by a line with its reason.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use cargo_metadata::{DependencyKind, Metadata, MetadataCommand, Package};

/// Which of our crates a crate may use.
///
/// Each may further use `kiln-testkit` in its tests, unless it is one that the testkit is made of.
const ARROWS: &[(&str, &[&str])] = &[
    ("kiln-domain", &[]),
    ("kiln-proto", &[]),
    ("kiln-chassis", &[]),
    ("kiln-contract", &["kiln-domain"]),
    ("kiln-registry", &["kiln-domain"]),
    ("kiln-credentials", &["kiln-contract", "kiln-registry"]),
    ("kiln-bus", &["kiln-contract", "kiln-domain"]),
    ("kiln-builder", &["kiln-domain", "kiln-registry"]),
    ("kiln-engine-local", ENGINE),
    ("kiln-engine-ws-manager", ENGINE),
    ("kiln-engine-kubernetes", ENGINE),
    ("kiln-testkit", &["kiln-domain", "kiln-contract", "kiln-bus", "kiln-registry", "kiln-proto"]),
    ("kiln-gateway", &["kiln-domain", "kiln-contract", "kiln-bus", "kiln-chassis", "kiln-proto"]),
    (
        "kiln-resolver",
        &["kiln-domain", "kiln-contract", "kiln-bus", "kiln-chassis", "kiln-registry", "kiln-credentials"],
    ),
    (
        "kiln-orchestrator",
        &["kiln-domain", "kiln-contract", "kiln-bus", "kiln-chassis", "kiln-registry", "kiln-credentials"],
    ),
    ("kiln-log-relay", &["kiln-domain", "kiln-contract", "kiln-bus", "kiln-chassis"]),
    ("kiln-cache-warmer", &["kiln-domain", "kiln-contract", "kiln-bus", "kiln-chassis"]),
    ("kiln", EVERYTHING_THAT_RUNS),
];

const ENGINE: &[&str] = &["kiln-domain", "kiln-registry", "kiln-proto"];

/// What the one binary joins: all but the testkit and the tests.
const EVERYTHING_THAT_RUNS: &[&str] = &[
    "kiln-domain",
    "kiln-proto",
    "kiln-chassis",
    "kiln-contract",
    "kiln-registry",
    "kiln-credentials",
    "kiln-bus",
    "kiln-builder",
    "kiln-engine-local",
    "kiln-engine-ws-manager",
    "kiln-engine-kubernetes",
    "kiln-gateway",
    "kiln-resolver",
    "kiln-orchestrator",
    "kiln-log-relay",
    "kiln-cache-warmer",
];

/// Crates that the testkit is made of and that know nothing of it.
const BENEATH_THE_TESTKIT: &[&str] = &["kiln-domain", "kiln-proto", "kiln-chassis", "kiln-contract"];

/// The whole-system tests use whatever they test.
const TESTS: &str = "kiln-tests";

/// Libraries of others that only few may use; each name stands for all that begin with it.
const KEPT_LIBRARIES: &[(&[&str], &[&str])] = &[
    (&["async-nats"], &["kiln-bus", "kiln-testkit"]),
    (&["tonic"], &["kiln-proto", "kiln-gateway", "kiln-testkit", "kiln", "kiln-engine-ws-manager", TESTS]),
    (&["kube", "k8s-openapi"], &["kiln-engine-kubernetes"]),
];

/// What crates without I/O may not even see.
const NOT_IN_PURE_CRATES: &[&str] =
    &["tokio", "tokio-util", "tokio-stream", "async-nats", "tonic", "reqwest", "rand", "tracing", "rustix"];
const PURE_CRATES: &[&str] = &["kiln-domain", "kiln-contract"];

/// Who beside `contract` may spell a part of a subject: folder or file, what, why.
const SUBJECT_EXCEPTIONS: &[(&str, &[&str], &str)] = &[
    ("crates/contract/", &["kiln.", "$JS.", "$KV.", "$SRV."], "its duty"),
    ("crates/bus/", &["$JS.", "$KV.", "$SRV."], "JetStream's own API, of which async-nats has no call"),
    ("crates/testkit/", &["$JS.", "$KV.", "$SRV."], "permissions of the test servers"),
    ("services/kiln/src/up/nats.rs", &["$JS."], "what the user `subscriber` of `kiln up` may ask"),
    (
        "services/kiln/tests/it/subscriber.rs",
        &["kiln.", "$JS.", "$KV."],
        "what that user is seen to be allowed and refused, in the server's own words",
    ),
    ("tests/tests/it/house_rules.rs", &["kiln.", "$JS.", "$KV.", "$SRV."], "this list"),
];

/// What would let the world into a crate without any library. Their tests may read files.
const NOT_IN_PURE_CODE: &[&str] =
    &["std::fs", "std::net", "std::env", "std::process", "std::thread", "std::io"];
const PURE_CODE: &[&str] = &["crates/domain/src/", "crates/contract/src/"];

const MAX_FILE_BYTES: usize = 40 * 1024;

#[test]
fn our_crates_use_only_what_the_design_lets_them() {
    let metadata = metadata();
    let mut wrong = Vec::new();
    for package in ours(&metadata).filter(|package| package.name.as_str() != TESTS) {
        let name = package.name.as_str();
        let Some((_, allowed)) = ARROWS.iter().find(|(from, _)| *from == name) else {
            wrong.push(format!("{name} has no line in ARROWS: say what it may use"));
            continue;
        };
        for dependency in package.dependencies.iter().filter(|dependency| dependency.path.is_some()) {
            let for_tests = dependency.kind == DependencyKind::Development
                && dependency.name == "kiln-testkit"
                && !BENEATH_THE_TESTKIT.contains(&name);
            if !for_tests && !allowed.contains(&dependency.name.as_str()) {
                wrong.push(format!("{name} -> {} ({})", dependency.name, dependency.kind));
            }
        }
    }
    none(&wrong, "arrows that the design does not draw");
}

#[test]
fn libraries_that_belong_to_a_few_crates_stay_there() {
    let metadata = metadata();
    let mut wrong = Vec::new();
    for package in ours(&metadata) {
        for dependency in &package.dependencies {
            for (prefixes, users) in KEPT_LIBRARIES {
                if prefixes.iter().any(|prefix| is_of_family(&dependency.name, prefix))
                    && !users.contains(&package.name.as_str())
                {
                    wrong.push(format!("{} -> {}", package.name, dependency.name));
                }
            }
            if PURE_CRATES.contains(&package.name.as_str())
                && dependency.kind != DependencyKind::Development
                && NOT_IN_PURE_CRATES.contains(&dependency.name.as_str())
            {
                wrong.push(format!(
                    "{} -> {} (it has no I/O, clock or randomness)",
                    package.name, dependency.name
                ));
            }
        }
    }
    none(&wrong, "libraries used where they may not be");
}

#[test]
fn pure_crates_reach_for_nothing_outside() {
    let wrong: Vec<_> = lines_of_code()
        .filter(|(path, _, _)| PURE_CODE.iter().any(|folder| path.starts_with(folder)))
        .filter(|(_, _, line)| NOT_IN_PURE_CODE.iter().any(|module| line.contains(module)))
        .map(|(path, line_number, line)| format!("{path}:{line_number}: {}", line.trim()))
        .collect();
    none(&wrong, "I/O in crates that have none");
}

#[test]
fn subjects_are_spelled_in_contract_alone() {
    let mut wrong = Vec::new();
    for (path, line_number, line) in lines_of_code() {
        for beginning in subjects_in(&line) {
            let excepted = SUBJECT_EXCEPTIONS
                .iter()
                .any(|(place, beginnings, _)| path.starts_with(place) && beginnings.contains(&beginning));
            if !excepted {
                wrong.push(format!("{path}:{line_number}: {}", line.trim()));
            }
        }
    }
    none(&wrong, "subjects outside crates/contract");
}

#[test]
fn a_subject_is_told_from_other_dotted_words() {
    let check = |line: &str, expected: &[&str]| assert_eq!(subjects_in(line), expected, "{line}");
    check(r#"format!("kiln.build.v1.{key}.>")"#, &["kiln."]);
    check(r#"  publish = ["kiln.log-relay.v1.>", "$JS.API.>"]"#, &["kiln.", "$JS."]);
    check(r#"subscribe("kiln.*.v1.>")"#, &["kiln."]);
    check(r#"subscribe("kiln.>")"#, &["kiln."]);
    check(r#"include_str!("kiln.v1.Builds")"#, &[]);
    check(r#"info!(kiln.build = %id)"#, &[]);
    check(r#"let name = "kiln.json";"#, &[]);
    check(r#""dev.kiln.build.queued.v1""#, &[]);
}

#[test]
fn no_file_is_too_large_to_read() {
    let wrong: Vec<_> = rust_files()
        .into_iter()
        .map(|(path, text)| (path, text.len()))
        .filter(|(_, bytes)| *bytes > MAX_FILE_BYTES)
        .map(|(path, bytes)| format!("{path}: {bytes} bytes"))
        .collect();
    none(&wrong, "Rust files over 40 KB: each is more than one thing");
}

#[test]
fn nothing_is_left_for_later() {
    // Written apart, so that this file does not hold what it looks for.
    let banned = [concat!("#[ign", "ore"), concat!("to", "do!("), concat!("unimple", "mented!(")];
    let wrong: Vec<_> = lines_of_code()
        .filter(|(_, _, line)| banned.iter().any(|word| line.contains(word)))
        .map(|(path, line_number, line)| format!("{path}:{line_number}: {}", line.trim()))
        .collect();
    none(&wrong, "tests that are not run, or code that is not there");
}

#[test]
fn the_workspace_lints_hold_in_every_crate() {
    let metadata = metadata();
    let wrong: Vec<_> = ours(&metadata)
        .filter(|package| !inherits_lints(package.manifest_path.as_std_path()))
        .map(|package| format!("{}: no `[lints] workspace = true`", package.name))
        .collect();
    none(&wrong, "crates with lints of their own");
}

#[test]
fn every_script_can_be_executed() {
    let root = root();
    let mut wrong = Vec::new();
    for folder in ["scripts", ".ci", "deploy"] {
        for file in files_under(&root.join(folder)) {
            let begins_as_script = fs::read(&file).is_ok_and(|bytes| bytes.starts_with(b"#!"));
            let mode = fs::metadata(&file).expect("a file that was listed").permissions().mode();
            let executable = mode & 0o111 != 0;
            // A file without `#!` is for sourcing, or no script at all.
            if begins_as_script != executable {
                wrong.push(format!(
                    "{}: `#!` {begins_as_script}, executable {executable}",
                    shown(&root, &file)
                ));
            }
        }
    }
    none(&wrong, "scripts whose first line and mode disagree");
}

fn none(wrong: &[String], what: &str) {
    assert!(wrong.is_empty(), "{what}:\n  {}", wrong.join("\n  "));
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ is in the workspace").to_owned()
}

fn metadata() -> Metadata {
    MetadataCommand::new()
        .manifest_path(root().join("Cargo.toml"))
        .no_deps()
        .other_options(["--offline".to_owned()])
        .exec()
        .expect("cargo describes the workspace")
}

fn ours(metadata: &Metadata) -> impl Iterator<Item = &Package> {
    metadata.packages.iter().filter(|package| metadata.workspace_members.contains(&package.id))
}

/// `tonic` and `tonic-prost` are of the family `tonic`; `tonics` is not.
fn is_of_family(name: &str, family: &str) -> bool {
    name.strip_prefix(family).is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
}

fn inherits_lints(manifest: &Path) -> bool {
    let text = fs::read_to_string(manifest).expect("the manifest of a member");
    let mut section = "";
    text.lines().map(str::trim).any(|line| {
        if line.starts_with('[') {
            section = line;
        }
        section == "[lints]" && line.replace(' ', "") == "workspace=true"
    })
}

/// The beginnings (`kiln.`, `$JS.`, …) of the subjects that a line spells.
///
/// `kiln.` begins a subject where a word (or `*`) and a version follow, or a `>`: not in `kiln.v1.Builds`, which is a
/// protobuf package, nor in names that only end in it.
fn subjects_in(line: &str) -> Vec<&'static str> {
    let mut found: BTreeSet<(usize, &'static str)> = BTreeSet::new();
    for (at, _) in line.match_indices("kiln.") {
        let (before, from) = line.split_at(at);
        let whole_word =
            !before.ends_with(|c: char| c.is_alphanumeric() || matches!(c, '.' | '_' | '-' | '/'));
        let mut tokens = from.split('.').skip(1);
        let is_subject = match (tokens.next(), tokens.next()) {
            (Some(word), _) if word.starts_with('>') => true,
            (Some(word), Some(version)) => {
                !word.is_empty() && version.starts_with("v1") && !word.contains(' ')
            }
            _ => false,
        };
        if whole_word && is_subject {
            found.insert((at, "kiln."));
        }
    }
    for beginning in ["$JS.", "$KV.", "$SRV."] {
        found.extend(line.match_indices(beginning).map(|(at, _)| (at, beginning)));
    }
    found.into_iter().map(|(_, beginning)| beginning).collect()
}

/// Every line of every Rust file that is not a comment: path, number, text.
fn lines_of_code() -> impl Iterator<Item = (String, usize, String)> {
    rust_files().into_iter().flat_map(|(path, text)| {
        text.lines()
            .enumerate()
            .filter(|(_, line)| !line.trim_start().starts_with("//"))
            .map(|(index, line)| (path.clone(), index + 1, line.to_owned()))
            .collect::<Vec<_>>()
    })
}

/// Every Rust file of the workspace: its path from the root, and its text.
fn rust_files() -> Vec<(String, String)> {
    let root = root();
    let files: Vec<_> = ["crates", "proto", "services", "tests"]
        .iter()
        .flat_map(|folder| files_under(&root.join(folder)))
        .filter(|path| path.extension().is_some_and(|extension| extension == "rs"))
        .map(|path| (shown(&root, &path), fs::read_to_string(&path).expect("a file that was listed")))
        .collect();
    assert!(files.len() > 30, "only {} Rust files found under {}", files.len(), root.display());
    files
}

fn shown(root: &Path, path: &Path) -> String {
    path.strip_prefix(root).unwrap_or(path).display().to_string()
}

/// All files under a folder, in order; build output and links left out. A folder that is not there has none.
fn files_under(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let mut entries: Vec<_> = entries.map(|entry| entry.expect("a folder's entry")).collect();
    entries.sort_by_key(fs::DirEntry::path);
    let mut files = Vec::new();
    for entry in entries {
        let kind = entry.file_type().expect("the kind of a folder's entry");
        if kind.is_dir() && entry.file_name() != "target" {
            files.extend(files_under(&entry.path()));
        } else if kind.is_file() {
            files.push(entry.path());
        }
    }
    files
}
