//! The registry of `kiln up`: Debian's `docker-registry`, or upstream's `registry`, or one that runs already.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use secrecy::{ExposeSecret as _, SecretString};
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::Instant;

use super::child::{Child, Program, StartError};
use super::data_dir::{self, DataDir, random_secret};
use super::programs;

const START: Duration = Duration::from_secs(20);
const GRACE: Duration = Duration::from_secs(10);
/// For one that runs already.
const PATIENCE: Duration = Duration::from_secs(5);

/// A running registry.
#[derive(Debug)]
pub(crate) struct Registry {
    /// Ours; none where it ran already.
    child: Option<Child>,
    /// `host:port`, as image references name it.
    pub(crate) address: String,
    /// Whether it is spoken to without TLS.
    pub(crate) plain_http: bool,
}

/// Why there is no registry.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(
        "no registry is there: install Debian's docker-registry (`apt install docker-registry`), or name one by KILN_REGISTRY, or use one that runs already by --registry HOST:PORT"
    )]
    NotFound,
    #[error("--registry {address}: nothing answers there")]
    Silent { address: String, source: std::io::Error },
    #[error(transparent)]
    Start(#[from] StartError),
    #[error(transparent)]
    DataDir(#[from] data_dir::Error),
}

impl Registry {
    /// Starts the registry that keeps its images in `data`, and waits until it answers.
    pub(crate) async fn start(data: &DataDir, program: &Path, listen: SocketAddr) -> Result<Self, Error> {
        let folder = data.folder("registry")?;
        let secret = data.secret("registry/http.secret", random_secret)?;
        let config = config(listen, &data.folder("registry/storage")?, &secret);
        let config = data.write("registry/config.yml", &format!("{config:#}\n"))?;
        let mut child = Child::start(Program {
            name: "docker-registry",
            path: program.to_owned(),
            arguments: vec!["serve".into(), config.into()],
            // Upstream's registry 3 would look for a collector on this machine otherwise.
            environment: programs::environment(&[("OTEL_TRACES_EXPORTER", "none")]),
            log: data.folder("logs")?.join("registry.log"),
            lock: folder.join("lock"),
        })?;
        let address = super::ports::reachable(listen).to_string();
        if let Err(error) = child.ready(START, async || answers(&address).await).await {
            child.stop(GRACE).await;
            return Err(error.into());
        }
        Ok(Self { child: Some(child), address, plain_http: true })
    }

    /// One that somebody else runs: waits until it answers.
    pub(crate) async fn running(address: &str) -> Result<Self, Error> {
        let until = Instant::now() + PATIENCE;
        loop {
            let error = match ask(address).await {
                Ok(plain_http) => return Ok(Self { child: None, address: address.to_owned(), plain_http }),
                Err(error) => error,
            };
            if Instant::now() >= until {
                return Err(Error::Silent { address: address.to_owned(), source: error });
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Ends our own, and waits for its end.
    pub(crate) async fn stop(self) {
        if let Some(child) = self.child {
            child.stop(GRACE).await;
        }
    }
}

/// The program: the one named by the user, or the first of the PATH, or Debian's.
pub(crate) fn find(named: Option<&Path>) -> Result<PathBuf, Error> {
    if let Some(path) = named {
        return Ok(path.to_owned());
    }
    let mut folders: Vec<PathBuf> = vec!["/usr/bin".into()];
    folders.extend(programs::bootstrap_folder());
    programs::candidates(&["docker-registry", "registry"], &folders).into_iter().next().ok_or(Error::NotFound)
}

/// The registry's configuration: YAML takes JSON. No debug server, no accesses in the log.
fn config(listen: SocketAddr, storage: &Path, secret: &SecretString) -> serde_json::Value {
    json!({
        "version": "0.1",
        "log": {"level": "warn", "accesslog": {"disabled": true}},
        "storage": {
            "filesystem": {"rootdirectory": storage},
            "delete": {"enabled": true},
        },
        "http": {"addr": listen.to_string(), "secret": secret.expose_secret()},
    })
}

/// Whether our own child answers by now.
async fn answers(address: &str) -> Result<(), String> {
    match ask(address).await {
        Ok(true) => Ok(()),
        Ok(false) => Err(format!("what answers at {address} is no registry")),
        Err(error) => Err(format!("{address}: {error}")),
    }
}

/// Asks without TLS, as the distribution specification says (end-1): true for 200, and for the 401 of a registry that
/// wants a password. Whatever else answers speaks TLS, or isn't one, which the first push shows.
async fn ask(address: &str) -> std::io::Result<bool> {
    let mut stream = TcpStream::connect(address).await?;
    let question = format!("GET /v2/ HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    stream.write_all(question.as_bytes()).await?;
    let mut start = [0; 12];
    let answered = tokio::time::timeout(PATIENCE, stream.read_exact(&mut start)).await;
    Ok(matches!(answered, Ok(Ok(_))) && matches!(&start, b"HTTP/1.1 200" | b"HTTP/1.1 401"))
}
