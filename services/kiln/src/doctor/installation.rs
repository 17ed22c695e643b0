//! Which installation is to be examined: by the configuration of its roles, or by the data directory of a `kiln up`.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kiln_domain::finding::Finding;
use rustix::fs::{FlockOperation, flock};
use serde::Deserialize;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::config::{Config, Engine, Loaded};
use crate::up;

const PART: &str = "kiln up";
const CONFIGURATION: &str = "configuration";
const ANSWER: Duration = Duration::from_secs(5);

/// What is to be examined.
pub(super) struct Installation {
    pub(super) config: Config,
    /// Whether its bus and registry are to be there.
    pub(super) runs: bool,
    /// What is to be said of the bus where it is not.
    pub(super) away: Option<Finding>,
    /// Where a `kiln up` says whether it is ready.
    pub(super) health: Option<String>,
    /// What was found on the way.
    pub(super) findings: Vec<Finding>,
}

/// `endpoints.json`, as far as it matters here.
#[derive(Deserialize)]
struct Endpoints {
    health: String,
}

impl Installation {
    /// Finds it. The error says why it can't be known what to examine.
    pub(super) fn find(config: Option<&Path>, data_dir: Option<PathBuf>) -> Result<Self, Finding> {
        let default =
            || up::default_data_dir().filter(|folder| config.is_none() && folder.join(up::LOCK).exists());
        match data_dir.or_else(default) {
            Some(folder) => Self::of_up(config, &folder),
            None => {
                let config = Loaded::checked(config, &[]).map_err(|error| wrong(&error))?.config;
                let says = format!("of roles, with NATS at {}", config.nats.url);
                let findings = vec![Finding::ok(CONFIGURATION, says)];
                Ok(Self { config, runs: true, away: None, health: None, findings })
            }
        }
    }

    fn of_up(config: Option<&Path>, folder: &Path) -> Result<Self, Finding> {
        let told = Loaded::read(config).map_err(|error| wrong(&error))?.config;
        let folder = folder.canonicalize().map_err(|error| no_data_dir(folder, &error.to_string()))?;
        let lock =
            File::open(folder.join(up::LOCK)).map_err(|error| no_data_dir(&folder, &error.to_string()))?;
        let runs = flock(&lock, FlockOperation::NonBlockingLockShared).is_err();
        drop(lock);
        let config = kept(told, &folder)?;
        let endpoints = match std::fs::read_to_string(folder.join(up::ENDPOINTS)) {
            Ok(text) if runs => serde_json::from_str::<Endpoints>(&text).ok(),
            _ => None,
        };
        let away = |says: &str| {
            Finding::unchecked("nats", says.to_owned(), "ask again when `kiln up` says that it is ready")
        };
        let Some(endpoints) = endpoints else {
            let says = format!("what is in {} is used by no process", folder.display());
            let (found, away) = if runs {
                let says = format!("it is starting or ending in {}", folder.display());
                let remedy =
                    format!("ask again; its messages tell what it waits for, and {}/logs", folder.display());
                (Finding::warning(PART, says, remedy), away("it isn't known where it is"))
            } else {
                let remedy = format!("start it: kiln up --data-dir {}", folder.display());
                (
                    Finding::warning(PART, says, remedy),
                    away("it runs only while `kiln up` does, and so do the registry and the services"),
                )
            };
            return Ok(Self { config, runs: false, away: Some(away), health: None, findings: vec![found] });
        };
        let findings = vec![Finding::ok(PART, format!("it runs in {}", folder.display()))];
        Ok(Self { config, runs, away: None, health: Some(endpoints.health), findings })
    }
}

/// What `kiln up` last ran with: whatever its flags, its file and its variables said. Of what is `told` here there is only
/// need for the secrets that such a file or variable held itself, which aren't kept.
fn kept(told: Config, folder: &Path) -> Result<Config, Finding> {
    let file = folder.join(up::CONFIGURATION);
    let text = match std::fs::read_to_string(&file) {
        Ok(text) => text,
        // It has not come so far yet.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let mut config = told;
            if let Engine::Local(local) = &mut config.engine {
                folder.clone_into(&mut local.folder);
            }
            return Ok(config);
        }
        Err(error) => return Err(no_data_dir(folder, &format!("{}: {error}", file.display()))),
    };
    let mut config: Config = serde_json::from_str(&text).map_err(|error| {
        let says = format!("{} can't be read: {error}", file.display());
        Finding::problem(PART, says, "use the `kiln` of the `kiln up` that wrote it, or start that again")
    })?;
    config.nats.password = told.nats.password.filter(|_| config.nats.password_file.is_none());
    config.seal.seed = told.seal.seed.filter(|_| config.seal.seed_file.is_none());
    Ok(config)
}

/// Whether a `kiln up` says that it is ready: of its gateway nothing is seen on the bus.
pub(super) async fn ready(health: Option<String>, runs: bool) -> Option<Finding> {
    const PART: &str = "gateway";
    let Some(address) = health else {
        return runs.then(|| {
            Finding::unchecked(PART, "gateways aren't seen on the bus", "`kiln ps --addr HOST:PORT` asks one")
        });
    };
    let asked = async {
        let mut stream = TcpStream::connect(&address).await?;
        let question = format!("GET /ready HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
        stream.write_all(question.as_bytes()).await?;
        let mut answer = String::new();
        stream.take(16 << 10).read_to_string(&mut answer).await?;
        std::io::Result::Ok(answer)
    };
    let answer = tokio::time::timeout(ANSWER, asked).await.unwrap_or_else(|late| Err(late.into()));
    Some(match answer {
        Ok(answer) if answer.starts_with("HTTP/1.1 200") => {
            Finding::ok(PART, format!("ready, says {address}/ready"))
        }
        Ok(answer) => {
            let says = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body).trim().to_owned();
            Finding::problem(
                PART,
                format!("not ready: {says}"),
                "it becomes so by itself once the bus answers; see its messages",
            )
        }
        Err(error) => Finding::problem(PART, format!("{address}: {error}"), "see the messages of `kiln up`"),
    })
}

fn no_data_dir(folder: &Path, why: &str) -> Finding {
    Finding::problem(
        PART,
        format!("{} is no data directory of `kiln up` that can be read: {why}", folder.display()),
        "give by --data-dir what `kiln up` was given, and run this as the user who ran it",
    )
}

fn wrong(error: &anyhow::Error) -> Finding {
    Finding::problem(
        CONFIGURATION,
        format!("{error:#}; nothing else was examined"),
        "mend it: `kiln check-config FILE` names each problem by its key",
    )
}
