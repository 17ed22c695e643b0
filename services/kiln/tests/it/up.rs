//! `kiln up` as a process: its children, ports, files and messages.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Output;

use rustix::process::Signal;

use crate::running::{FREE_PORTS, Up, answers, eventually, get, is_gone, kiln, nats_greeting, signal};

/// A `kiln up` that is expected to fail.
fn refused(data: &Path, arguments: &[&str], environment: &[(&str, &Path)]) -> String {
    let output: Output = kiln()
        .arg("up")
        .arg("--data-dir")
        .arg(data)
        .args(arguments)
        .envs(environment.iter().copied())
        .output()
        .expect("ran");
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "");
    String::from_utf8(output.stderr).expect("UTF-8")
}

/// An executable script.
fn script(folder: &Path, name: &str, text: &str) -> PathBuf {
    let path = folder.join(name);
    std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).expect("written");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).expect("executable");
    path
}

#[test]
fn it_says_when_it_is_ready_and_ends_all_of_it_when_asked() {
    let folder = tempfile::tempdir().expect("a folder");
    let data = folder.path().join("data");
    let mut up = Up::start(&data);
    let endpoints = up.endpoints();
    for name in ["grpc", "registry", "health", "metrics"] {
        let address = endpoints[name].as_str().expect("an endpoint");
        assert!(up.ready_line.contains(&format!("{name} {address}")), "{}", up.ready_line);
        assert!(answers(up.address(name)), "{name}");
    }
    assert!(nats_greeting(up.address("nats")).is_some());
    assert!(get(up.address("health"), "/ready").starts_with("HTTP/1.1 200"));
    assert!(get(up.address("metrics"), "/metrics").contains("kiln_build_info"));
    assert!(get(up.address("registry"), "/v2/").starts_with("HTTP/1.1 200"));

    let children = up.both_children();
    assert_eq!(up.terminate().code(), Some(0), "{}", up.log());
    assert!(children.iter().all(|pid| is_gone(*pid)));
    assert!(!data.join("endpoints.json").exists());
}

#[test]
fn nothing_of_it_is_for_others_to_read() {
    let folder = tempfile::tempdir().expect("a folder");
    let data = folder.path().join("data");
    let up = Up::start(&data);
    let mut folders = vec![data.clone()];
    while let Some(next) = folders.pop() {
        let mode = |path: &Path| std::fs::metadata(path).expect("there").permissions().mode() & 0o777;
        assert_eq!(mode(&next), 0o700, "{}", next.display());
        for entry in std::fs::read_dir(&next).expect("read").map(|entry| entry.expect("an entry").path()) {
            // What the children keep in their stores is behind a closed door.
            if entry.is_dir() && !entry.ends_with("store") && !entry.ends_with("storage") {
                folders.push(entry);
            } else if entry.is_file() {
                assert_eq!(mode(&entry), 0o600, "{}", entry.display());
            }
        }
    }
    for secret in ["seal.key", "nats/services.password", "nats/subscriber.password"] {
        let text = std::fs::read_to_string(data.join(secret)).expect("a secret");
        assert!(!up.log().contains(text.trim()), "{secret} is in the log");
        let command_lines = up.both_children().map(|pid| std::fs::read(format!("/proc/{pid}/cmdline")));
        for line in command_lines.iter().flatten() {
            assert!(!String::from_utf8_lossy(line).contains(text.trim()), "{secret} is an argument");
        }
    }
}

#[test]
fn the_children_do_not_outlive_a_killed_parent_and_the_next_takes_over() {
    let folder = tempfile::tempdir().expect("a folder");
    let data = folder.path().join("data");
    let mut first = Up::start(&data);
    let (children, endpoints) = (first.both_children(), first.endpoints());
    first.kill();
    for child in children {
        eventually("the child's end", || is_gone(child).then_some(()));
    }

    let second = Up::start(&data);
    assert_eq!(second.endpoints(), endpoints, "ports and password are kept");
    assert_ne!(second.both_children(), children);
}

#[test]
fn a_child_that_dies_is_started_again_with_growing_pauses() {
    let folder = tempfile::tempdir().expect("a folder");
    let up = Up::start(&folder.path().join("data"));
    let address = up.address("nats");
    for pause in ["100 ms", "200 ms", "400 ms"] {
        let [nats, _] = up.both_children();
        signal(nats, Signal::KILL);
        let said = format!("it is started again in {pause}");
        eventually(&said, || up.log().contains(&said).then_some(()));
        let again = eventually("another nats-server", || {
            let pid = up.child_of_name("nats.conf").filter(|pid| *pid != nats)?;
            nats_greeting(address).map(|_| pid)
        });
        assert_ne!(again, nats);
    }
    let [_, registry] = up.both_children();
    signal(registry, Signal::KILL);
    eventually("another registry", || {
        up.child_of_name("config.yml").filter(|pid| *pid != registry)?;
        answers(up.address("registry")).then_some(())
    });
    eventually("ready again", || {
        get(up.address("health"), "/ready").starts_with("HTTP/1.1 200").then_some(())
    });
}

#[test]
fn a_second_one_on_the_same_data_is_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let data = folder.path().join("data");
    let up = Up::start(&data);
    let message = refused(&data, &FREE_PORTS, &[]);
    assert!(message.starts_with("kiln: another `kiln up` (process "), "{message}");
    assert!(message.contains("--data-dir"), "{message}");
    assert!(answers(up.address("grpc")), "the first one is unharmed");
}

#[test]
fn a_port_in_use_is_named_with_its_flag() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = taken.local_addr().expect("an address").to_string();
    for flag in ["--grpc-listen", "--nats-listen", "--registry-listen"] {
        let folder = tempfile::tempdir().expect("a folder");
        let arguments: Vec<&str> = FREE_PORTS
            .chunks(2)
            .flat_map(|pair| if pair[0] == flag { [flag, &address] } else { [pair[0], pair[1]] })
            .collect();
        let message = refused(&folder.path().join("data"), &arguments, &[]);
        assert!(message.contains(&format!("{flag}: {address} is in use")), "{message}");
    }
}

#[test]
fn an_old_nats_server_is_refused_and_the_message_says_how_to_get_another() {
    let folder = tempfile::tempdir().expect("a folder");
    let old = script(folder.path(), "nats-server", "echo 'nats-server: v2.9.10'");
    let message = refused(&folder.path().join("data"), &FREE_PORTS, &[("KILN_NATS_SERVER", &old)]);
    assert!(message.contains("no nats-server of 2.11 or newer"), "{message}");
    assert!(message.contains("is 2.9"), "{message}");
    assert!(message.contains("scripts/bootstrap"), "{message}");
}

#[test]
fn a_child_that_cannot_start_is_quoted() {
    let folder = tempfile::tempdir().expect("a folder");
    let broken = script(
        folder.path(),
        "nats-server",
        "[ \"$1\" = --version ] && exec echo 'nats-server: v2.15.1'\necho 'the disk is on fire' >&2\nexit 7",
    );
    let message = refused(&folder.path().join("data"), &FREE_PORTS, &[("KILN_NATS_SERVER", &broken)]);
    assert!(message.contains("nats-server ended while it started (exit status: 7)"), "{message}");
    assert!(message.contains("the disk is on fire"), "{message}");

    let absent = folder.path().join("absent");
    let message = refused(&folder.path().join("other"), &FREE_PORTS, &[("KILN_REGISTRY", &absent)]);
    assert!(message.contains("can't start "), "{message}");
}

#[test]
fn credentials_in_an_argument_are_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let arguments: Vec<&str> = FREE_PORTS
        .chunks(2)
        .filter(|pair| pair[0] != "--nats-listen")
        .flatten()
        .copied()
        .chain(["--nats-url", "nats://kiln:hunter2@127.0.0.1:1"])
        .collect();
    let message = refused(&folder.path().join("data"), &arguments, &[]);
    assert!(message.contains("must not hold credentials"), "{message}");
    assert!(!message.contains("hunter2"), "{message}");
}
