//! `kiln doctor`: a healthy installation, and troubles that are made here by hand.

use std::fs::{self, File};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime};

use kiln_domain::id::{BuildId, ImageKey, RunId};
use kiln_domain::run_folder;
use serde_json::Value;
use tokio::time::Instant;

use crate::running::{Up, kiln};

const SMALL: &str = r#"{"streams": {"journal_max_bytes": 268435456, "logs_max_bytes": 268435456}}"#;

/// The exit status and the findings, without the summary.
fn doctor(arguments: &[&str], environment: &[(&str, &str)]) -> (Option<i32>, Vec<Value>) {
    let output = kiln()
        .args(["doctor", "--json"])
        .args(arguments)
        // Whatever this user keeps is none of the test's business.
        .env("XDG_DATA_HOME", "/nonexistent")
        .envs(environment.iter().copied())
        .output()
        .expect("run");
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    let mut lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    let summary = lines.pop().expect("a summary");
    assert_eq!(summary["type"], "summary", "{text}");
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    (output.status.code(), lines)
}

/// Those that aren't good: verdict, part, what is said.
fn bad(findings: &[Value]) -> Vec<(String, String, String)> {
    let text = |finding: &Value, name: &str| finding[name].as_str().unwrap_or_default().to_owned();
    let bad = findings.iter().filter(|finding| finding["verdict"] != "ok");
    bad.map(|finding| {
        assert!(!text(finding, "remedy").is_empty(), "{finding}");
        (text(finding, "verdict"), text(finding, "part"), text(finding, "says"))
    })
    .collect()
}

/// Whether one of them is this.
fn has(bad: &[(String, String, String)], verdict: &str, part: &str, says: &str) -> bool {
    bad.iter().any(|(v, p, s)| v == verdict && p == part && s.contains(says))
}

/// A data directory to be made in `folder`, and a configuration of small streams for it.
fn small(folder: &Path) -> (PathBuf, String) {
    let config = folder.join("kiln.json");
    fs::write(&config, SMALL).expect("written");
    (folder.join("data"), config.to_str().expect("UTF-8").to_owned())
}

fn run_id(image: &str) -> RunId {
    RunId::new(&BuildId::new(&ImageKey::of(image), *b"0123456789"), 1)
}

/// A run's folder as a builder leaves it, last written ten minutes ago.
fn left_run(data: &Path, run: &RunId) -> PathBuf {
    let folder = data.join("runs").join(run.as_str());
    fs::create_dir_all(folder.join(run_folder::WORK)).expect("made");
    let old = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
    File::create(folder.join(run_folder::OUTPUT)).expect("made").set_modified(old).expect("set");
    File::create(folder.join(run_folder::LOCK)).expect("made");
    File::open(&folder).expect("opened").set_modified(old).expect("set");
    folder
}

#[test]
fn of_an_installation_that_is_well_all_is_well_and_no_secret_is_told() {
    let folder = tempfile::tempdir().expect("a folder");
    let (data, config) = small(folder.path());
    let (at, config) = (data.to_str().expect("UTF-8"), config.as_str());
    // What it is told by its file and its flags, the doctor needn't be told again.
    let mut up = Up::start_with(&data, &["--config", config, "--builder", "buildah"]);
    let asked = ["--data-dir", at];
    let (status, findings) = doctor(&asked, &[("KILN_ENGINE__LOCAL__BUILDER", "buildkit")]);
    assert_eq!((status, bad(&findings)), (Some(0), vec![]), "{findings:#?}");
    assert!(
        findings
            .iter()
            .any(|finding| finding["part"] == "build tool" && finding["says"] == "buildah, as configured"),
        "{findings:#?}"
    );
    for part in [
        "build storage",
        "kiln up",
        "gateway",
        "nats",
        "stream KILN_BUILDS",
        "bucket KILN_SECRETS",
        "seal key",
        "orchestrators",
    ] {
        assert!(findings.iter().any(|finding| finding["part"] == part), "{part}: {findings:#?}");
    }
    let text = kiln().arg("doctor").args(asked).output().expect("run");
    let text = String::from_utf8(text.stdout).expect("UTF-8");
    assert!(text.ends_with(" ok\n") && text.contains("\n0 problems, 0 warnings, 0 not checked, "), "{text}");
    let kept = fs::read_to_string(data.join("configuration.json")).expect("read");
    for secret in ["nats/services.password", "nats/subscriber.password", "seal.key", "life"] {
        let secret = fs::read_to_string(data.join(secret)).expect("read");
        assert!(!text.contains(secret.trim()), "{text}");
        assert!(!kept.contains(secret.trim()), "{kept}");
    }

    // With other sizes than the processes have, streams aren't as they should be; and another key than the
    // installation's is one thing, none is another.
    let mut other: Value = serde_json::from_str(&kept).expect("JSON");
    other["streams"]["journal_max_bytes"] = (4_i64 << 30).into();
    other["seal"]["seed_file"] = "/nonexistent/seed".into();
    fs::write(data.join("configuration.json"), other.to_string()).expect("written");
    let (status, findings) = doctor(&asked, &[]);
    let found = bad(&findings);
    assert_eq!(status, Some(1));
    assert!(
        has(&found, "problem", "stream KILN_BUILDS", "max_bytes is 268435456, not 4294967296"),
        "{found:?}"
    );
    assert!(has(&found, "problem", "seal key", "/nonexistent/seed"), "{found:?}");
    fs::write(data.join("configuration.json"), &kept).expect("written");

    // The registry is gone.
    let [_, registry] = up.both_children();
    crate::running::signal(registry, rustix::process::Signal::STOP);
    let (status, findings) = doctor(&asked, &[]);
    crate::running::signal(registry, rustix::process::Signal::CONT);
    let found = bad(&findings);
    assert!(status == Some(1) && found.len() == 2, "{found:?}");
    assert!(
        found.iter().all(|(verdict, part, _)| verdict == "problem" && part.starts_with("registry ")),
        "{found:?}"
    );

    // It doesn't run.
    up.terminate();
    let (status, findings) = doctor(&asked, &[]);
    let found = bad(&findings);
    assert!(status == Some(0) && found.len() == 2, "{found:?}");
    assert!(findings.iter().any(|finding| finding["part"] == "build storage"), "{findings:#?}");
    assert!(
        has(&found, "warning", "kiln up", "is used by no process") && has(&found, "unchecked", "nats", ""),
        "{found:?}"
    );
}

#[test]
fn what_is_left_of_runs_is_listed_and_removed() {
    let folder = tempfile::tempdir().expect("a folder");
    let (data, config) = small(folder.path());
    let (at, config) = (data.to_str().expect("UTF-8"), config.as_str());
    let asked = ["--data-dir", at];
    let up = Up::start_with(&data, &["--config", config]);

    let left = left_run(&data, &run_id("left"));
    let alive = left_run(&data, &run_id("alive"));
    let lock = alive.join(run_folder::LOCK);
    let script = format!("exec 9<>'{}'; flock 9; echo; exec sleep 3600", lock.display());
    let mut process =
        Command::new("sh").args(["-c", &script]).stdout(Stdio::piped()).spawn().expect("started");
    let mut line = [0];
    std::io::Read::read_exact(process.stdout.as_mut().expect("its stdout"), &mut line)
        .expect("it has the lock");
    let marker = data.join("runs").join(run_id("marker").as_str());
    fs::create_dir_all(&marker).expect("made");
    let old = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
    File::create(marker.join(run_folder::REVOKED)).expect("made").set_modified(old).expect("set");
    let mounted = left.join(run_folder::WORK).join("merged");
    fs::create_dir(&mounted).expect("made");
    let mount = Command::new("mount").args(["-t", "tmpfs", "kiln-test"]).arg(&mounted).status().expect("run");
    File::open(&left).expect("opened").set_modified(old).expect("set");

    let (status, findings) = doctor(&asked, &[]);
    let found = bad(&findings);
    assert_eq!(status, Some(1), "{found:?}");
    assert!(
        has(&found, "warning", "runs", &format!("`{}`, of which no build is known", run_id("left"))),
        "{found:?}"
    );
    assert!(
        findings.iter().any(|finding| finding["part"] == "runs"
            && finding["remedy"].as_str().is_some_and(|remedy| remedy.contains("no orchestrator does"))),
        "{findings:#?}"
    );
    assert!(has(&found, "problem", "processes", &format!(" {} sleep", process.id())), "{found:?}");
    assert!(has(&found, "warning", "runs", "1 revocations are older than a day"), "{found:?}");
    // Where one may mount.
    if mount.success() {
        assert!(has(&found, "warning", "mounts", mounted.to_str().expect("UTF-8")), "{found:?}");
    }

    // What lives of a build that nobody knows may be another installation's: it stays.
    let (status, findings) = doctor(&[&asked[..], &["--fix"]].concat(), &[]);
    let found = bad(&findings);
    assert!(
        status == Some(1) && found.len() == 1 && has(&found, "problem", "processes", " sleep"),
        "{found:?}"
    );
    assert!(
        findings.iter().any(|finding| finding["part"] == "fix" && finding["verdict"] == "ok"),
        "{findings:#?}"
    );
    assert!(!marker.exists(), "the old revocation is there");
    let rest: Vec<_> =
        fs::read_dir(&left).expect("read").map(|entry| entry.expect("an entry").file_name()).collect();
    assert_eq!(rest, [run_folder::REVOKED], "a late start must find it revoked");
    process.kill().expect("killed");
    process.wait().expect("waited for");
    let (status, findings) = doctor(&[&asked[..], &["--fix"]].concat(), &[]);
    assert_eq!((status, bad(&findings)), (Some(0), vec![]));
    drop(up);
}

#[test]
fn it_says_so_where_nothing_is_as_it_needs() {
    let folder = tempfile::tempdir().expect("a folder");
    let engine = folder.path().to_str().expect("UTF-8");
    let of_engine = ("KILN_ENGINE__LOCAL__FOLDER", engine);
    let of_buildah = ("KILN_ENGINE__LOCAL__BUILDER", "buildah");
    // Nobody listens, and no program is there.
    let (status, findings) =
        doctor(&[], &[("KILN_NATS__URL", "nats://127.0.0.1:1"), of_engine, of_buildah, ("PATH", engine)]);
    let found = bad(&findings);
    assert_eq!(status, Some(1));
    assert!(has(&found, "problem", "nats", "Connection refused"), "{found:?}");
    assert!(has(&found, "problem", "git", "not found on the PATH"), "{found:?}");
    assert!(has(&found, "problem", "buildah", "not found on the PATH"), "{found:?}");
    assert!(has(&found, "unchecked", "runs", "can't be read"), "{found:?}");

    // Somebody listens, and says nothing.
    let silent = TcpListener::bind("127.0.0.1:0").expect("bound");
    let url = format!("nats://{}", silent.local_addr().expect("its address"));
    let begun = Instant::now();
    let (status, findings) = doctor(&[], &[("KILN_NATS__URL", &url), of_engine]);
    assert!(status == Some(1) && has(&bad(&findings), "problem", "nats", ""), "{findings:#?}");
    assert!(begun.elapsed() < Duration::from_secs(30), "it took {:?}", begun.elapsed());

    // What is to be looked at can't be known.
    let (status, findings) = doctor(&[], &[("KILN_NATS__NAME", "s3cret"), of_engine]);
    assert!(
        status == Some(1) && has(&bad(&findings), "problem", "configuration", "`nats.name`"),
        "{findings:#?}"
    );
    assert!(!format!("{findings:?}").contains("s3cret"));
    let (status, findings) = doctor(&["--data-dir", engine], &[]);
    assert!(
        status == Some(1) && has(&bad(&findings), "problem", "kiln up", "is no data directory"),
        "{findings:#?}"
    );
    for name in ["layers", "runs"] {
        fs::create_dir(folder.path().join(name)).expect("made");
    }
    let odd = ("KILN_ENGINE__LOCAL__STORAGE_DRIVER", "btrfs");
    let tool = ("KILN_ENGINE__LOCAL__BUILDER", "buildah");
    let (_, findings) = doctor(&[], &[("KILN_NATS__URL", "nats://127.0.0.1:1"), of_engine, tool, odd]);
    assert!(has(&bad(&findings), "problem", "build storage", "btrfs"), "{findings:#?}");
}
