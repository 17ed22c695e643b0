//! The user `subscriber` of `kiln up`'s NATS: it reads the events and nothing else. Spoken to in NATS's own protocol,
//! so that a refusal is seen as the server says it.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::TcpStream;
use std::time::Duration;

use serde_json::{Value, json};

use crate::running::Up;

/// A connection, with all that can be heard on `_INBOX.>`.
struct Nats {
    lines: BufReader<TcpStream>,
    out: TcpStream,
}

impl Nats {
    fn connect(url: &str) -> Self {
        let (user, rest) = url.strip_prefix("nats://").and_then(|url| url.split_once(':')).expect("a user");
        let (password, address) = rest.split_once('@').expect("a password");
        let out = TcpStream::connect(address).expect("connected");
        out.set_read_timeout(Some(Duration::from_secs(20))).expect("a timeout");
        let mut nats = Self { lines: BufReader::new(out.try_clone().expect("a clone")), out };
        assert!(nats.line().starts_with("INFO "));
        let options =
            json!({"verbose": false, "user": user, "pass": password, "headers": true, "protocol": 1});
        nats.send(&format!("CONNECT {options}\r\nSUB _INBOX.mine.> 1\r\nPING\r\n"));
        assert_eq!(nats.line(), "PONG");
        nats
    }

    fn send(&mut self, text: &str) {
        self.out.write_all(text.as_bytes()).expect("sent");
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.lines.read_line(&mut line).expect("a line");
        line.trim_end().to_owned()
    }

    /// What the server says to some commands: the `-ERR` lines and the messages' headers, until its PONG.
    fn said(&mut self, commands: &str) -> Vec<String> {
        self.send(&format!("{commands}PING\r\n"));
        let mut said = Vec::new();
        loop {
            match self.line() {
                pong if pong == "PONG" => return said,
                ping if ping == "PING" => self.send("PONG\r\n"),
                line => said.push(line),
            }
        }
    }

    /// Asks the JetStream API.
    fn ask(&mut self, subject: &str, body: &Value) -> Value {
        let body = body.to_string();
        self.send(&format!("PUB {subject} _INBOX.mine.1 {}\r\n{body}\r\n", body.len()));
        loop {
            let line = self.line();
            assert!(!line.starts_with("-ERR"), "{subject}: {line}");
            if line.starts_with("MSG ") {
                return serde_json::from_str(&self.line()).expect("JSON");
            }
        }
    }
}

#[test]
fn the_subscriber_reads_the_events_and_nothing_else() {
    let folder = tempfile::tempdir().expect("a folder");
    let up = Up::start(&folder.path().join("data"));
    let endpoints = up.endpoints();
    let url = endpoints["nats"].as_str().expect("a URL");
    assert!(url.starts_with("nats://subscriber:"), "{url}");
    let mut nats = Nats::connect(url);

    let info = nats.ask("$JS.API.STREAM.INFO.KILN_EVENTS", &json!({}));
    assert_eq!(info["config"]["mirror"]["name"], "KILN_BUILDS", "{info}");
    let consumer = json!({"stream_name": "KILN_EVENTS", "config": {
        "name": "mine", "deliver_policy": "all", "ack_policy": "explicit", "inactive_threshold": 60_000_000_000_u64,
    }});
    let made = nats.ask("$JS.API.CONSUMER.CREATE.KILN_EVENTS.mine", &consumer);
    assert_eq!(made["name"], "mine", "{made}");
    let next = json!({"batch": 1, "no_wait": true}).to_string();
    nats.send(&format!(
        "PUB $JS.API.CONSUMER.MSG.NEXT.KILN_EVENTS.mine _INBOX.mine.2 {}\r\n{next}\r\n",
        next.len()
    ));
    let answer = nats.line();
    assert!(answer.starts_with("HMSG _INBOX.mine.2 "), "{answer}");
    nats.said("");
    let deleted = nats.ask("$JS.API.CONSUMER.DELETE.KILN_EVENTS.mine", &json!({}));
    assert_eq!(deleted["success"], true, "{deleted}");

    for subject in [
        "kiln.build.v1.x.y.queued",
        "kiln.orchestrator.v1.build",
        "$KV.KILN_HOLDERS.x",
        "$JS.API.STREAM.INFO.KILN_BUILDS",
        "$JS.API.STREAM.MSG.GET.KILN_LOGS",
        "$JS.API.STREAM.PURGE.KILN_EVENTS",
        "$JS.API.STREAM.DELETE.KILN_EVENTS",
        "$JS.API.DIRECT.GET.KILN_LOGS",
        "$JS.API.DIRECT.GET.KV_KILN_SECRETS",
        "$JS.API.CONSUMER.CREATE.KILN_BUILDS",
        "$JS.API.CONSUMER.CREATE.KILN_LOGS.mine",
        "$JS.API.CONSUMER.DURABLE.CREATE.KILN_BUILDS.mine",
    ] {
        let said = nats.said(&format!("PUB {subject} 2\r\n{{}}\r\n"));
        let refusal = format!("-ERR 'Permissions Violation for Publish to \"{subject}\"'");
        assert_eq!(said, [refusal], "{subject}");
    }
    for subject in [">", "kiln.>", "kiln.live.v1.*", "_KILN_INBOX.>", "$KV.>"] {
        let said = nats.said(&format!("SUB {subject} 9\r\n"));
        assert_eq!(said, [format!("-ERR 'Permissions Violation for Subscription to \"{subject}\"'")]);
    }
}
