//! What the services stand on: NATS and a registry, started here or running already.

use std::net::{SocketAddr, TcpListener};

use super::Options;
use super::data_dir::DataDir;
use super::nats::{self, Nats};
use super::ports::Ports;
use super::registry::{self, Registry};

/// Both are there.
#[derive(Debug)]
pub(crate) struct Backing {
    pub(crate) nats: Nats,
    pub(crate) registry: Registry,
}

impl Backing {
    /// Starts what is to be started, both at once, and waits until it answers.
    pub(crate) async fn start(
        options: &Options,
        data: &DataDir,
        ports: &mut Ports<'_>,
    ) -> anyhow::Result<Self> {
        // Both are held until both are known, so that they are two.
        let nats_port = match &options.nats_url {
            Some(_) => None,
            None => Some(ports.listen("--nats-listen", options.nats_listen).await?),
        };
        let registry_port = match &options.registry {
            Some(_) => None,
            None => Some(ports.listen("--registry-listen", options.registry_listen).await?),
        };
        let nats = nats(options, data, release(nats_port)?);
        let registry = registry(options, data, release(registry_port)?);
        match tokio::join!(nats, registry) {
            (Ok(nats), Ok(registry)) => Ok(Self { nats, registry }),
            (Ok(nats), Err(error)) => {
                nats.stop().await;
                Err(error)
            }
            (Err(error), Ok(registry)) => {
                registry.stop().await;
                Err(error)
            }
            (Err(first), Err(second)) => Err(anyhow::anyhow!("{first:#}; {second:#}")),
        }
    }

    /// Ends what was started here.
    pub(crate) async fn stop(self) {
        tokio::join!(self.registry.stop(), self.nats.stop());
    }
}

/// Where the child is to listen; from now on nobody does.
fn release(port: Option<TcpListener>) -> std::io::Result<Option<SocketAddr>> {
    port.map(|listener| listener.local_addr()).transpose()
}

async fn nats(options: &Options, data: &DataDir, listen: Option<SocketAddr>) -> anyhow::Result<Nats> {
    match (&options.nats_url, listen) {
        (None, Some(listen)) => {
            let program = nats::find(options.nats_program.as_deref()).await?;
            Ok(Nats::start(data, &program, listen).await?)
        }
        (url, _) => Ok(Nats::running(url.as_deref().unwrap_or_default())?),
    }
}

async fn registry(options: &Options, data: &DataDir, listen: Option<SocketAddr>) -> anyhow::Result<Registry> {
    match (&options.registry, listen) {
        (None, Some(listen)) => {
            let program = registry::find(options.registry_program.as_deref())?;
            Ok(Registry::start(data, &program, listen).await?)
        }
        (address, _) => Ok(Registry::running(address.as_deref().unwrap_or_default()).await?),
    }
}
