//! The command line against a gateway: what it writes where, how it ends, and that a log's bytes survive whatever
//! the connection does.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "clippy takes only the tests themselves for tests, not what they share"
)]

mod build;
mod gateway;
mod logs;

use std::net::{SocketAddr, TcpListener};
use std::process::Stdio;

use kiln_proto::kiln_v1::{Build, BuildState, FailureReason};
use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};
use serde_json::Value;
use tokio::process::{Child, Command};

use self::gateway::{Gateway, Script};

const ID: &str = "0123456789abcdef-0123456789abcdef-abcdefghij0";

fn kiln(address: SocketAddr, words: &[&str]) -> Command {
    kiln_at(&address.to_string(), words)
}

fn kiln_at(address: &str, words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kiln"));
    command.args(words).env("KILN_ADDR", address).env_remove("KILN_GIT_PASSWORD");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    command
}

struct Ended {
    code: Option<i32>,
    stdout: Vec<u8>,
    stderr: String,
}

impl Ended {
    fn text(&self) -> &str {
        str::from_utf8(&self.stdout).unwrap()
    }

    fn objects(&self) -> Vec<Value> {
        self.text().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

async fn run(gateway: &Gateway, words: &[&str]) -> Ended {
    end(kiln(gateway.address, words).spawn().unwrap()).await
}

async fn end(child: Child) -> Ended {
    let output = child.wait_with_output().await.unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    Ended { code: output.status.code(), stdout: output.stdout, stderr }
}

fn build(id: &str, state: BuildState) -> Build {
    let at = |seconds| Some(prost_types::Timestamp { seconds, nanos: 0 });
    Build {
        id: id.into(),
        r#ref: "127.0.0.1:5000/workspace:abc".into(),
        state: state as i32,
        attempt: 1,
        queued_at: at(100),
        started_at: at(110),
        revision: 1,
        ..Build::default()
    }
}

fn over(state: BuildState, reason: FailureReason, message: &str) -> Build {
    Build {
        reason: reason as i32,
        message: message.into(),
        digest: if state == BuildState::Succeeded { "sha256:1234".into() } else { String::new() },
        finished_at: Some(prost_types::Timestamp { seconds: 182, nanos: 0 }),
        revision: 9,
        ..build(ID, state)
    }
}

fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; length];
    SmallRng::seed_from_u64(seed).fill_bytes(&mut bytes);
    bytes
}

#[tokio::test]
async fn a_prefix_stands_for_the_one_build_that_it_fits() {
    let script = Script::new(8);
    let ids: Vec<String> =
        (0..5).map(|n| format!("{n}123456789abcdef-0123456789abcdef-abcdefghij0")).collect();
    let mut builds: Vec<Build> = ids.iter().map(|id| build(id, BuildState::Running)).collect();
    builds.push(build(&ids[4].replace("ij0", "iz0"), BuildState::Failed));
    *script.builds.lock().unwrap() = builds;
    let gateway = Gateway::start(script).await;
    let ended = run(&gateway, &["status", "-o", "json", "3"]).await;
    assert_eq!(
        (ended.code, ended.objects()[0]["id"].as_str()),
        (Some(0), Some(ids[3].as_str())),
        "{}",
        ended.stderr
    );
    let ended = run(&gateway, &["cancel", "0123", "--reason", "why"]).await;
    assert_eq!((ended.code, ended.text()), (Some(0), &*format!("{} running, asked to stop\n", ids[0])));
    assert_eq!(gateway.script.cancelled.lock().unwrap()[0].reason, "why");
    let ended = run(&gateway, &["status", "4"]).await;
    assert_eq!(ended.code, Some(2));
    assert!(ended.stderr.contains(&ids[4]) && ended.stderr.contains("iz0  failed"), "{}", ended.stderr);
    for id in ["9", "../x", "*", ">", "", &"x".repeat(10_240), &ids[0].replace("ij0", "xx0")] {
        for command in ["status", "cancel"] {
            let ended = run(&gateway, &[command, id]).await;
            assert_eq!((ended.code, ended.text()), (Some(2), ""), "{command} {id:.20}");
            assert!(ended.stderr.starts_with("kiln: ") && ended.stderr.len() < 300, "{}", ended.stderr);
        }
    }
}

#[tokio::test]
async fn lists_and_what_stands_in_them() {
    let script = Script::new(9);
    let hostile = Build { owner: "\x1b]0;x\x07\nalice".into(), ..build(ID, BuildState::Running) };
    let mut builds = vec![hostile];
    builds.extend((0..6).map(|_| over(BuildState::Failed, FailureReason::Timeout, "x")));
    *script.builds.lock().unwrap() = builds;
    let gateway = Gateway::start(script).await;
    let ended = run(&gateway, &["ps"]).await;
    let lines: Vec<&str> = ended.text().lines().collect();
    assert_eq!((ended.code, lines.len()), (Some(0), 2), "{}", ended.text());
    assert!(
        lines[0].starts_with("ID ") && lines[1].contains("\\u{1b}]0;x\\u{7}\\nalice"),
        "{}",
        ended.text()
    );
    assert_eq!(run(&gateway, &["ps", "-a"]).await.text().lines().count(), 8);
    assert_eq!(run(&gateway, &["ps", "-a", "--limit", "4", "-o", "json"]).await.objects().len(), 4);
    assert_eq!(run(&gateway, &["ps", "--owner", "bob", "-o", "json"]).await.text(), "");
}

#[tokio::test]
async fn references_are_resolved() {
    let gateway = Gateway::start(Script::new(10)).await;
    let ended = run(&gateway, &["resolve", "x", "--platform", "linux/arm64"]).await;
    assert_eq!((ended.code, ended.text()), (Some(0), &*format!("x@sha256:{}#linux/arm64\n", "0".repeat(64))));
    assert_eq!(
        ended.stderr,
        "kiln: for linux/arm64, from the cache: the registry said so 0s ago\n\
         kiln: this answer is an old one: the registry could not be asked\n"
    );
    let ended = run(&gateway, &["resolve", "x", "--refresh", "-o", "json"]).await;
    assert_eq!((&ended.objects()[0]["stale"], ended.stderr.as_str()), (&false.into(), ""));
    let ended = run(&gateway, &["refs", "-o", "json"]).await;
    assert_eq!(ended.objects()[0]["ref"], "r.io/warm:1");
    let ended = run(&gateway, &["resolve", "UPPER/x"]).await;
    assert_eq!(ended.code, Some(2));
    assert_eq!(
        ended.stderr,
        "kiln: resolving the reference: the request is not valid: ref: must be lowercase\n"
    );
}

#[tokio::test]
async fn a_gateway_that_is_not_there() {
    let free = TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap();
    for words in
        [&["ps"][..], &["build", "https://h/x"], &["logs", "-f", ID], &["status", "0"], &["resolve", "x"]]
    {
        let ended = end(kiln(free, words).spawn().unwrap()).await;
        assert_eq!((ended.code, ended.text()), (Some(3), ""), "{words:?}");
        let expected =
            format!("kiln: can't reach the gateway at http://{free}: Connection refused (os error 111)\n");
        assert_eq!(ended.stderr, expected);
    }
    let ended = end(kiln(free, &["ps", "--addr", "ftp://x"]).spawn().unwrap()).await;
    assert_eq!(ended.code, Some(2));
    assert!(ended.stderr.contains("the scheme must be http or https"), "{}", ended.stderr);
}

#[tokio::test]
async fn help_has_examples_and_shells_are_completed() {
    let nowhere = SocketAddr::from(([127, 0, 0, 1], 1));
    for command in ["build", "logs", "ps", "status", "cancel", "resolve", "refs", "completions"] {
        let ended = end(kiln(nowhere, &[command, "--help"]).spawn().unwrap()).await;
        assert_eq!(ended.code, Some(0));
        assert!(ended.text().contains(&format!("Examples:\n  kiln {command}")), "{}", ended.text());
    }
    for (shell, word) in [("bash", "complete "), ("zsh", "#compdef kiln"), ("fish", "complete -c kiln")] {
        let ended = end(kiln(nowhere, &["completions", shell]).spawn().unwrap()).await;
        assert!(ended.code == Some(0) && ended.text().contains(word), "{shell}");
    }
    for words in [&["build"][..], &["build", "u", "--image", "x"], &["logs"], &["ps", "--limit", "0"]] {
        assert_eq!(end(kiln(nowhere, words).spawn().unwrap()).await.code, Some(2), "{words:?}");
    }
}
