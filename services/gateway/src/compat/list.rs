//! ListBuilds: what is built now, by us and by an image-builder-mk3 beside us.

use kiln_proto::builder as api;
use tonic::Status;

use crate::compat::{ImageBuilderApi, info};
use crate::status;

impl ImageBuilderApi {
    pub(crate) async fn listed(&self) -> Result<api::ListBuildsResponse, Status> {
        self.builds.cuts.presence.check().await.map_err(status::of_bus)?;
        if !self.builds.view.is_caught_up() {
            return Err(Status::unavailable("this gateway is still reading what there is; ask again"));
        }
        let active = self.builds.view.active();
        let runs = active.iter().filter(|entry| entry.record.handle.is_some());
        let runs = runs.map(|entry| entry.record.run().to_string()).collect();
        let mut builds: Vec<_> = active.iter().map(|entry| info::of(&entry.record)).collect();
        match self.log_infos.ask(runs, true).await {
            Ok(mut known) => {
                for (build, entry) in builds.iter_mut().zip(&active) {
                    build.log_info = known.runs.remove(entry.record.run().as_str());
                }
                builds.append(&mut known.others);
            }
            // Our own builds are listed whoever can't be asked.
            Err(error) => {
                tracing::warn!("where logs are, and what others build, can't be asked now: {error}")
            }
        }
        Ok(api::ListBuildsResponse { builds })
    }
}
