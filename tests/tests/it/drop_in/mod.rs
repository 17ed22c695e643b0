//! Kiln in the place of an image-builder-mk3: the old API in front, a ws-manager with its workspaces and supervisors behind,
//! and all of Kiln's roles between.

mod cut_off;
mod python;
mod whole_path;

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use kiln_bus::seal::OpenKey;
use kiln_proto::builder as mk3;
use kiln_proto::builder::image_builder_client::ImageBuilderClient;
use kiln_testkit::fleet::Fleet;
use kiln_testkit::installation::program;
use kiln_testkit::wire::Wire;
use kiln_testkit::workshop::Workshop;
use kiln_testkit::ws_manager::{Work, WsManager};
use secrecy::ExposeSecret as _;
use tonic::Streaming;
use tonic::transport::Channel;

const SOON: Duration = Duration::from_secs(120);

/// A Kiln, a ws-manager, and the wires between.
struct Place {
    workshop: Arc<Workshop>,
    ws_manager: WsManager,
    /// To the ws-manager.
    wire: Wire,
    /// To the supervisors.
    supervisors: Wire,
    fleet: Fleet,
}

impl Place {
    async fn set(
        roles: &[&'static str],
        work: impl FnOnce(&Arc<Workshop>) -> Result<Arc<dyn Work>>,
    ) -> Result<Self> {
        let workshop = Arc::new(Workshop::new().await?);
        let ws_manager = WsManager::start(work(&workshop)?).await?;
        let wire = Wire::to(&ws_manager.address.to_string()).await?;
        let supervisors = Wire::to(&ws_manager.supervisors.address.to_string()).await?;
        ws_manager.supervisors.reach_at(supervisors.address());
        let seed = OpenKey::new_seed()?;
        let (program, seed) = (program()?, seed.expose_secret());
        let fleet =
            Fleet::start_on_ws_manager(&program, &workshop.registry, seed, roles, wire.address()).await?;
        Ok(Self { workshop, ws_manager, wire, supervisors, fleet })
    }

    async fn client(&self) -> Result<ImageBuilderClient<Channel>> {
        self.fleet.image_builder().await
    }

    /// A build's log from its beginning to its end, followed.
    async fn log(&self, request: mk3::LogsRequest) -> Result<Vec<u8>> {
        let reading = async {
            let mut chunks = self.client().await?.logs(request).await?.into_inner();
            let mut log = Vec::new();
            while let Some(chunk) = chunks.message().await? {
                log.extend(chunk.content);
            }
            Ok(log)
        };
        tokio::time::timeout(SOON, reading).await.with_context(|| self.fleet.log())?
    }
}

/// The next message of a Build.
async fn next(stream: &mut Streaming<mk3::BuildResponse>) -> Result<mk3::BuildResponse> {
    tokio::time::timeout(SOON, stream.message()).await.context("no message")??.context("the stream ended")
}

fn by_id(build_id: &str) -> mk3::LogsRequest {
    mk3::LogsRequest { build_id: build_id.to_owned(), ..Default::default() }
}
