//! `kiln build`: following, ending, being interrupted.

use std::process::Stdio;

use kiln_proto::kiln_v1::build_image_response::Outcome;
use kiln_proto::kiln_v1::source::From as SourceFrom;
use kiln_proto::kiln_v1::{AlreadyBuilt, Build, BuildImageResponse, BuildState, FailureReason, Step};
use kiln_testkit::wire::Wire;
use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncBufReadExt as _, AsyncRead, AsyncReadExt as _, BufReader};
use tokio::process::{Child, Command};
use tonic::Status;

use super::gateway::{Gateway, Script};
use super::{ID, build, end, kiln, kiln_at, noise, over, run};

#[tokio::test]
async fn a_build_is_followed_to_its_end() {
    for (last, code, said) in [
        (
            over(BuildState::Succeeded, FailureReason::Unspecified, ""),
            0,
            "kiln: succeeded after 1m12s\n  ref     127.0.0.1:5000/workspace:abc\n  digest  sha256:1234\n",
        ),
        (
            over(BuildState::Failed, FailureReason::Dockerfile, "step 2 exited with 7"),
            1,
            "kiln: failed after 1m12s (dockerfile): step 2 exited with 7\n",
        ),
        (
            over(BuildState::Cancelled, FailureReason::Unspecified, "wrong branch"),
            1,
            "kiln: cancelled after 1m12s: wrong branch\n",
        ),
    ] {
        let mut script = Script::new(3);
        script.log = b"STEP 1/2: FROM scratch\n\x1b[31mred\x1b[0m \xff\n".to_vec();
        script.record.send_replace(last);
        accepts(&script, true);
        accepts(&script, false);
        let gateway = Gateway::start(script).await;
        let words =
            ["build", "https://h/x", "--revision", "v1", "--build-arg", "A=1", "--git-username", "me"];
        let child = kiln(gateway.address, &words).env("KILN_GIT_PASSWORD", "s3cret").spawn().unwrap();
        let ended = end(child).await;
        assert_eq!(ended.code, Some(code), "{}", ended.stderr);
        assert_eq!(ended.stdout, gateway.script.log);
        assert!(ended.stderr.starts_with(&format!("kiln: joined build {ID}")), "{}", ended.stderr);
        assert!(ended.stderr.contains(said), "{}", ended.stderr);
        let asked = gateway.script.asked.borrow()[0].clone();
        let Some(SourceFrom::Dockerfile(dockerfile)) = asked.source.unwrap().from else {
            panic!("not a Dockerfile")
        };
        let git = dockerfile.git.unwrap();
        assert_eq!(
            (git.revision.as_str(), git.username.as_str(), git.password.as_str()),
            ("v1", "me", "s3cret")
        );

        let json = run(&gateway, &["build", "--image", "ubuntu", "-o", "json"]).await;
        let objects = json.objects();
        assert_eq!((json.code, json.stderr.as_str()), (Some(code), ""));
        assert_eq!((&objects[0]["type"], &objects[0]["joined"]), (&"build".into(), &false.into()));
        assert!(objects.iter().any(|object| object["type"] == "log" && object["complete"] == true));
        let result = objects.last().unwrap();
        assert_eq!((&result["type"], &result["duration_ms"]), (&"result".into(), &72_000.into()), "{result}");
        assert_eq!(result["id"], ID);
    }
}

#[tokio::test]
async fn on_a_terminal_a_line_below_the_log_shows_the_step() {
    let mut script = Script::new(14);
    script.log = b"one\ntwo".to_vec();
    script.written.send_replace(4);
    let step = Step { number: 3, of: 7, name: "RUN make".into(), ..Step::default() };
    script.record.send_replace(Build { current_step: Some(step), ..build(ID, BuildState::Running) });
    accepts(&script, false);
    let gateway = Gateway::start(script).await;
    // `script` runs a command on a terminal of its own, and copies what is written there.
    let mut command = Command::new("script");
    let line = format!("{} build https://h/x", env!("CARGO_BIN_EXE_kiln"));
    command
        .args(["-qefc", &line, "/dev/null"])
        .env("KILN_ADDR", gateway.address.to_string())
        .env("TERM", "xterm");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).kill_on_drop(true);
    let mut child = command.spawn().unwrap();
    let mut terminal = child.stdout.take().unwrap();
    let mut seen = String::new();
    // Drawn below the line that is whole …
    read_until(&mut terminal, &mut seen, "one\r\n").await;
    read_until(&mut terminal, &mut seen, "step 3/7 · RUN make (").await;
    // … and away for good once there is one that isn't.
    gateway.script.written.send_replace(7);
    read_until(&mut terminal, &mut seen, "two").await;
    gateway.script.record.send_replace(over(BuildState::Succeeded, FailureReason::Unspecified, ""));
    let mut rest = String::new();
    terminal.read_to_string(&mut rest).await.unwrap();
    assert!(rest.starts_with("\r\nkiln: succeeded after 1m12s\r\n"), "{rest:?}");
    assert_eq!(child.wait().await.unwrap().code(), Some(0));
}

async fn read_until(from: &mut (impl AsyncRead + Unpin), seen: &mut String, text: &str) {
    let mut bytes = std::mem::take(seen).into_bytes();
    while !String::from_utf8_lossy(&bytes).contains(text) {
        let byte = from.read_u8().await;
        bytes.push(byte.unwrap_or_else(|_| panic!("no {text:?} in {:?}", String::from_utf8_lossy(&bytes))));
    }
}

#[tokio::test]
async fn a_build_is_followed_through_a_cut() {
    let mut script = Script::new(11);
    script.log = b"before\nafter\n".to_vec();
    script.written.send_replace(7);
    script.record.send_replace(build(ID, BuildState::Running));
    accepts(&script, false);
    let gateway = Gateway::start(script).await;
    let wire = Wire::to(&gateway.address.to_string()).await.unwrap();
    let mut child = kiln_at(wire.address(), &["build", "https://h/x"]).spawn().unwrap();
    child.stdout.as_mut().unwrap().read_exact(&mut [0; 7]).await.unwrap();
    wire.cut();
    let mut notices = BufReader::new(child.stderr.take().unwrap()).lines();
    while !notices.next_line().await.unwrap().unwrap().ends_with("; trying again") {}
    gateway.script.written.send_replace(usize::MAX);
    gateway.script.record.send_replace(over(BuildState::Succeeded, FailureReason::Unspecified, ""));
    wire.restore();
    let ended = end(child).await;
    assert_eq!((ended.code, ended.text()), (Some(0), "after\n"));
}

#[tokio::test]
async fn a_build_whose_log_nobody_reads_or_can_be_had_still_ends_as_it_ended() {
    let mut script = Script::new(12);
    script.log = noise(4_000_000, 12);
    script.record.send_replace(build(ID, BuildState::Running));
    accepts(&script, false);
    let gateway = Gateway::start(script).await;
    let mut child = kiln(gateway.address, &["build", "https://h/x"]).spawn().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    stdout.read_exact(&mut [0; 100]).await.unwrap();
    drop(stdout);
    gateway.script.record.send_replace(over(BuildState::Failed, FailureReason::Timeout, ""));
    let ended = end(child).await;
    assert_eq!(ended.code, Some(1), "{}", ended.stderr);

    let mut script = Script::new(13);
    script.lost = true;
    script.record.send_replace(over(BuildState::Succeeded, FailureReason::Unspecified, ""));
    accepts(&script, false);
    let gateway = Gateway::start(script).await;
    let ended = run(&gateway, &["build", "https://h/x"]).await;
    assert_eq!((ended.code, ended.text()), (Some(0), ""));
    assert!(
        ended.stderr.contains("not found: the log is gone; going on without the log"),
        "{}",
        ended.stderr
    );
}

#[tokio::test]
async fn a_build_that_need_not_be_followed() {
    let script = Script::new(4);
    accepts(&script, false);
    let image =
        AlreadyBuilt { r#ref: "host/x:y".into(), base_ref: "host/b:z".into(), digest: "sha256:1".into() };
    let answer = BuildImageResponse { outcome: Some(Outcome::AlreadyBuilt(image)), joined: false };
    let full = Status::resource_exhausted("the queue is full: 1000 builds wait");
    script.answer.lock().unwrap().extend([Ok(answer.clone()), Ok(answer), Err(full)]);
    let gateway = Gateway::start(script).await;
    let ended = run(&gateway, &["build", "--detach", "https://h/x"]).await;
    assert_eq!((ended.code, ended.text(), ended.stderr.as_str()), (Some(0), &*format!("{ID}\n"), ""));
    let ended = run(&gateway, &["build", "https://h/x"]).await;
    assert_eq!((ended.code, ended.text()), (Some(0), ""));
    assert_eq!(ended.stderr, "kiln: already built\n  ref     host/x:y\n  digest  sha256:1\n");
    let ended = run(&gateway, &["build", "https://h/x", "-o", "json"]).await;
    assert_eq!(ended.objects()[0]["state"], "already_built");
    // Which a script may tell from a service that isn't able.
    let ended = run(&gateway, &["build", "https://h/x"]).await;
    assert_eq!(ended.code, Some(4));
    assert_eq!(
        ended.stderr,
        "kiln: asking for the build: a limit of the service is reached, try again later: the queue is full: 1000 builds wait\n"
    );
    // Nothing is left to answer: the service isn't able.
    let ended = run(&gateway, &["build", "https://h/x"]).await;
    assert_eq!(ended.code, Some(3));
    assert_eq!(
        ended.stderr,
        "kiln: asking for the build: the service isn't able now, try again later: no orchestrator answers\n"
    );
}

#[tokio::test]
async fn ctrl_c_leaves_the_build_running_and_says_how_to_come_back() {
    let mut script = Script::new(5);
    script.log = b"begun, not ended".to_vec();
    script.written.send_replace(5);
    script.record.send_replace(build(ID, BuildState::Running));
    accepts(&script, false);
    let gateway = Gateway::start(script).await;
    let mut child = kiln(gateway.address, &["build", "https://h/x"]).spawn().unwrap();
    child.stdout.as_mut().unwrap().read_exact(&mut [0; 5]).await.unwrap();
    interrupt(&child);
    let ended = end(child).await;
    assert_eq!(ended.code, Some(130));
    let back = format!("kiln: the build goes on; come back to it with: kiln logs -f {ID}\n");
    assert!(ended.stderr.ends_with(&back), "{}", ended.stderr);
    assert!(gateway.script.cancelled.lock().unwrap().is_empty());
}

#[tokio::test]
async fn ctrl_c_before_the_answer_waits_for_the_id_and_a_second_does_not() {
    for second in [false, true] {
        let script = Script::new(6);
        script.answering.send_replace(false);
        accepts(&script, false);
        let gateway = Gateway::start(script).await;
        let mut child = kiln(gateway.address, &["build", "https://h/x"]).spawn().unwrap();
        gateway.script.asked.subscribe().wait_for(|asked| !asked.is_empty()).await.unwrap();
        interrupt(&child);
        let mut stderr = BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        stderr.read_line(&mut line).await.unwrap();
        assert_eq!(line, "kiln: waiting for the build's id; Ctrl-C again to end at once\n");
        if second {
            interrupt(&child);
        } else {
            gateway.script.answering.send_replace(true);
        }
        let ended = end(child).await;
        let mut rest = String::new();
        stderr.read_to_string(&mut rest).await.unwrap();
        assert_eq!(ended.code, Some(130));
        assert_eq!(
            (ended.text().trim(), rest.contains("kiln logs -f")),
            if second { ("", false) } else { (ID, true) }
        );
    }
}

fn accepts(script: &Script, joined: bool) {
    let outcome = Some(Outcome::Build(build(ID, BuildState::Queued)));
    script.answer.lock().unwrap().push_back(Ok(BuildImageResponse { outcome, joined }));
}

fn interrupt(child: &Child) {
    let pid = child.id().and_then(|id| Pid::from_raw(id.cast_signed())).unwrap();
    kill_process(pid, Signal::INT).unwrap();
}
