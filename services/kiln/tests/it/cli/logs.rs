//! `kiln logs`: every byte once, whatever the connection does.

use base64::Engine as _;
use kiln_testkit::wire::Wire;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader};

use super::gateway::{Gateway, Script};
use super::{ID, end, kiln, kiln_at, noise, run};

#[tokio::test]
async fn a_log_is_whole_however_often_its_stream_breaks() {
    for seed in 0..3 {
        let log = noise(120_000, seed);
        let mut script = Script::new(seed);
        script.log = log.clone();
        *script.breaks.lock().unwrap() = 6;
        let gateway = Gateway::start(script).await;
        let raw = run(&gateway, &["logs", "-f", ID]).await;
        assert_eq!(raw.code, Some(0), "seed {seed}: {}", raw.stderr);
        assert!(
            raw.stdout == log,
            "seed {seed}: {} of {} bytes\n{}",
            raw.stdout.len(),
            log.len(),
            raw.stderr
        );
        assert_eq!(*gateway.script.breaks.lock().unwrap(), 0, "seed {seed}: not every break was met");

        *gateway.script.breaks.lock().unwrap() = 3;
        let json = run(&gateway, &["logs", "-f", "--output", "json", ID]).await;
        let mut read = Vec::new();
        for part in json.objects() {
            assert_eq!((&part["type"], part["offset"].as_u64()), (&"log".into(), Some(read.len() as u64)));
            match part.get("base64") {
                Some(exact) => {
                    let exact = base64::engine::general_purpose::STANDARD.decode(exact.as_str().unwrap());
                    read.extend(exact.unwrap());
                }
                None => read.extend(part["text"].as_str().unwrap().as_bytes()),
            }
            assert_eq!(part["complete"].as_bool(), Some(read.len() == log.len()));
        }
        assert!(read == log, "seed {seed}: {} of {} bytes\n{}", read.len(), log.len(), json.stderr);
    }
}

#[tokio::test]
async fn a_cut_wire_is_outlived() {
    let log = noise(300_000, 7);
    let mut script = Script::new(7);
    script.log = log.clone();
    script.written.send_replace(150_000);
    let gateway = Gateway::start(script).await;
    let wire = Wire::to(&gateway.address.to_string()).await.unwrap();
    let mut child = kiln_at(wire.address(), &["logs", "-f", ID]).spawn().unwrap();
    let mut read = vec![0; 150_000];
    child.stdout.as_mut().unwrap().read_exact(&mut read).await.unwrap();
    wire.cut();
    let mut notices = BufReader::new(child.stderr.take().unwrap()).lines();
    let notice = notices.next_line().await.unwrap().unwrap();
    assert!(notice.starts_with("kiln: reading the log: ") && notice.ends_with("; trying again"), "{notice}");
    wire.restore();
    gateway.script.written.send_replace(log.len());
    let ended = end(child).await;
    read.extend(ended.stdout);
    assert_eq!(ended.code, Some(0));
    assert!(read == log, "{} of {} bytes", read.len(), log.len());
}

#[tokio::test]
async fn a_log_from_a_place() {
    let mut script = Script::new(1);
    script.log = b"0123456789".to_vec();
    script.kept_from = 3;
    let gateway = Gateway::start(script).await;
    for (words, expected) in [
        (&["logs", ID][..], "3456789"),
        (&["logs", "--tail", "4", ID], "6789"),
        (&["logs", "--offset", "5", ID], "56789"),
        (&["logs", "--offset", "10", "-f", ID], ""),
    ] {
        let ended = run(&gateway, words).await;
        assert_eq!((ended.code, ended.text()), (Some(0), expected), "{words:?}: {}", ended.stderr);
    }
    let ended = run(&gateway, &["logs", "--offset", "2", ID]).await;
    assert_eq!((ended.code, ended.text()), (Some(2), ""));
    assert_eq!(ended.stderr, "kiln: reading the log: out of range: the log begins at offset 3\n");
    gateway.script.written.send_replace(6);
    let ended = run(&gateway, &["logs", ID]).await;
    assert_eq!((ended.code, ended.text()), (Some(0), "345"), "what is there, of a log that goes on");
}

#[tokio::test]
async fn who_wants_what_is_there_is_told_soon_that_nothing_can_be_had() {
    let mut script = Script::new(3);
    script.away = true;
    let gateway = Gateway::start(script).await;
    let ended = run(&gateway, &["logs", ID]).await;
    assert_eq!((ended.code, ended.text()), (Some(3), ""));
    let said: Vec<_> = ended.stderr.lines().collect();
    let why = "kiln: reading the log: the service isn't able now, try again later: the bus does not answer";
    assert_eq!(said.last(), Some(&why));
    // Six tries in all, each of which says why.
    assert_eq!(said, [[format!("{why}; trying again").as_str(); 5].as_slice(), &[why]].concat());
}

#[tokio::test]
async fn whoever_stops_reading_ends_it_quietly() {
    let mut script = Script::new(2);
    script.log = noise(4_000_000, 2);
    let gateway = Gateway::start(script).await;
    let mut child = kiln(gateway.address, &["logs", "-f", ID]).spawn().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    stdout.read_exact(&mut [0; 100]).await.unwrap();
    drop(stdout);
    let ended = end(child).await;
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""));
}

#[tokio::test]
async fn what_there_is_of_a_log_is_told_without_reading_it() {
    let mut script = Script::new(9);
    script.log = b"0123456789".to_vec();
    script.kept_from = 4;
    script.written.send_replace(6);
    let gateway = Gateway::start(script).await;
    let table = run(&gateway, &["logs", "--info", ID]).await;
    assert_eq!((table.code, table.stderr.as_str()), (Some(0), ""));
    for part in ["6 bytes", "growing", "from byte 4 on"] {
        assert!(table.text().contains(part), "{part}: {}", table.text());
    }
    let json = run(&gateway, &["logs", "--info", "-o", "json", ID]).await;
    let info = &json.objects()[0];
    assert_eq!(
        (&info["length"], &info["first_offset"], &info["complete"]),
        (&6.into(), &4.into(), &false.into())
    );
    assert_eq!(run(&gateway, &["logs", "--info", "-f", ID]).await.code, Some(2));
    let mut script = Script::new(9);
    script.lost = true;
    let gateway = Gateway::start(script).await;
    let lost = run(&gateway, &["logs", "--info", ID]).await;
    assert_eq!(lost.code, Some(2));
    assert!(lost.stderr.contains("the log is gone"), "{}", lost.stderr);
}
