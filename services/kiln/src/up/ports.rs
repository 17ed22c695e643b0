//! Which port each part of `kiln up` has. A port 0 picks one at the first start and keeps it: image references hold
//! the registry's.

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener};
use std::ops::Range;
use std::time::Duration;

use rand::RngExt as _;

use super::data_dir::{self, DataDir};

const FILE: &str = "ports.json";
/// Below the range that the kernel takes for outgoing connections (32768 and up): a port from there might be
/// somebody's outgoing one at the next start, and a client of a server that is down could even connect to itself.
const CHOICE: Range<u16> = 20_000..32_000;
const TRIES: usize = 100;
/// A predecessor that was killed, and its children, may take this long to close their ports.
const PATIENCE: Duration = Duration::from_secs(3);

/// The kept ports of a data directory.
#[derive(Debug)]
pub(crate) struct Ports<'a> {
    data: &'a DataDir,
    kept: BTreeMap<String, u16>,
}

/// Why a part has no port.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("{flag}: {address} is in use by another program{}", advice(*kept))]
    InUse { flag: &'static str, address: SocketAddr, kept: bool },
    #[error("{flag}: can't listen on {address}: {source}")]
    Refused { flag: &'static str, address: SocketAddr, source: std::io::Error },
    #[error("{flag}: found no free port of {}", ip)]
    NoneFree { flag: &'static str, ip: std::net::IpAddr },
    #[error("{FILE} of the data directory is damaged: {0}")]
    Damaged(serde_json::Error),
    #[error(transparent)]
    DataDir(#[from] data_dir::Error),
}

impl<'a> Ports<'a> {
    pub(crate) fn open(data: &'a DataDir) -> Result<Self, Error> {
        let kept = match data.read(FILE)? {
            Some(text) => serde_json::from_str(&text).map_err(Error::Damaged)?,
            None => BTreeMap::new(),
        };
        Ok(Self { data, kept })
    }

    /// Listens where `flag` (its value is `address`) says. For a part that listens by itself, the caller drops the
    /// listener just before that part begins.
    pub(crate) async fn listen(
        &mut self,
        flag: &'static str,
        address: SocketAddr,
    ) -> Result<TcpListener, Error> {
        if address.port() != 0 {
            return bind_patiently(flag, address, false).await;
        }
        if let Some(port) = self.kept.get(flag) {
            return bind_patiently(flag, SocketAddr::new(address.ip(), *port), true).await;
        }
        let listener = pick(flag, address)?;
        let port = listener.local_addr().map_err(|source| Error::Refused { flag, address, source })?.port();
        self.kept.insert(flag.to_owned(), port);
        let text = serde_json::to_string_pretty(&self.kept).map_err(Error::Damaged)?;
        self.data.write(FILE, &text)?;
        Ok(listener)
    }
}

/// Where a client on this machine reaches what listens on `address`.
pub(crate) fn reachable(address: SocketAddr) -> SocketAddr {
    match address {
        SocketAddr::V4(v4) if v4.ip().is_unspecified() => {
            SocketAddr::new(std::net::Ipv4Addr::LOCALHOST.into(), address.port())
        }
        SocketAddr::V6(v6) if v6.ip().is_unspecified() => {
            SocketAddr::new(std::net::Ipv6Addr::LOCALHOST.into(), address.port())
        }
        _ => address,
    }
}

async fn bind_patiently(flag: &'static str, address: SocketAddr, kept: bool) -> Result<TcpListener, Error> {
    let until = tokio::time::Instant::now() + PATIENCE;
    loop {
        match TcpListener::bind(address) {
            Ok(listener) => return Ok(listener),
            Err(error) if error.kind() != std::io::ErrorKind::AddrInUse => {
                return Err(Error::Refused { flag, address, source: error });
            }
            Err(_) if tokio::time::Instant::now() >= until => {
                return Err(Error::InUse { flag, address, kept });
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

fn pick(flag: &'static str, address: SocketAddr) -> Result<TcpListener, Error> {
    let mut random = rand::rng();
    for _ in 0..TRIES {
        let candidate = SocketAddr::new(address.ip(), random.random_range(CHOICE));
        match TcpListener::bind(candidate) {
            Ok(listener) => return Ok(listener),
            Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => {}
            Err(source) => return Err(Error::Refused { flag, address: candidate, source }),
        }
    }
    Err(Error::NoneFree { flag, ip: address.ip() })
}

fn advice(kept: bool) -> &'static str {
    if kept {
        " (this data directory keeps that port since its first start): end that program, or name a port"
    } else {
        ": name another port, or 0 for any that is free"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ANY: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 0);

    #[tokio::test(start_paused = true)]
    async fn a_picked_port_is_kept_and_a_taken_one_is_named() {
        let parent = tempfile::tempdir().expect("a folder");
        let data = DataDir::open(&parent.path().join("data")).expect("opened");
        let mut ports = Ports::open(&data).expect("ports");
        let first = ports.listen("--grpc-listen", ANY).await.expect("a port");
        let other = ports.listen("--nats-listen", ANY).await.expect("a port");
        let address = first.local_addr().expect("an address");
        assert_ne!(address, other.local_addr().expect("an address"));
        drop(first);

        let again = Ports::open(&data).expect("ports").listen("--grpc-listen", ANY).await.expect("a port");
        assert_eq!(again.local_addr().expect("an address"), address);

        let kept = Ports::open(&data).expect("ports").listen("--grpc-listen", ANY).await;
        let message = kept.expect_err("in use").to_string();
        assert!(message.starts_with(&format!("--grpc-listen: {address} is in use")), "{message}");
        assert!(message.contains("keeps that port"), "{message}");
        let named = ports.listen("--health-listen", address).await.expect_err("in use").to_string();
        assert_eq!(
            named,
            format!(
                "--health-listen: {address} is in use by another program: name another port, or 0 for any that is free"
            )
        );
    }
}
