//! `kiln supervise`: becomes a program that ends with its parent.

use std::process::Stdio;

use crate::running::kiln;

fn supervise(parent: &str, program: &[&str]) -> (Option<i32>, String, String) {
    let output = kiln()
        .args(["supervise", "--parent", parent, "--"])
        .args(program)
        .stderr(Stdio::piped())
        .output()
        .expect("ran");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
    (output.status.code(), text(output.stdout), text(output.stderr))
}

#[test]
fn it_becomes_the_program() {
    let parent = std::process::id().to_string();
    let (status, out, _) = supervise(&parent, &["/bin/sh", "-c", "echo $0 $PPID; exit 3", "--its-own"]);
    assert_eq!((status, out), (Some(3), format!("--its-own {parent}\n")));
}

#[test]
fn it_starts_nothing_for_another_parent() {
    let (status, out, message) = supervise("1", &["/bin/echo", "started"]);
    assert_eq!((status, out.as_str()), (Some(1), ""));
    assert_eq!(message, "kiln supervise: process 1 is not the parent (any more)\n");
}

#[test]
fn a_program_that_is_not_there_is_named() {
    let (status, _, message) = supervise(&std::process::id().to_string(), &["/nowhere/nats-server"]);
    assert_eq!(status, Some(1));
    assert!(message.starts_with("kiln supervise: can't start /nowhere/nats-server: "), "{message}");
}
