//! The running step of a build: no history, kept in memory, one message a build. Losing it costs nothing.

use futures::{Stream, StreamExt as _};
use kiln_contract::event::Progress;
use kiln_contract::subject;
use kiln_domain::id::BuildId;

use super::Logs;
use crate::error::BusError;

const PROGRESS: &str = "carry a build's progress";

impl Logs {
    /// Tells the running step, without waiting for an answer.
    pub async fn publish_progress(&self, id: &BuildId, progress: &Progress) -> Result<(), BusError> {
        let body = serde_json::to_vec(progress).map_err(|error| BusError::malformed(PROGRESS, error))?;
        let bus = &self.shared.bus;
        bus.call(PROGRESS, bus.client.publish(subject::progress(id), body.into())).await
    }

    /// The step that was told last. `None` where none was told yet, or where it can't be read: it is not history.
    pub async fn last_progress(&self, id: &BuildId) -> Option<Progress> {
        let stream = self.shared.bus.js.get_stream_no_info(subject::PROGRESS_STREAM).await.ok()?;
        let told = stream.direct_get_last_for_subject(subject::progress(id));
        let message = self.shared.bus.call(PROGRESS, told).await.ok()?;
        serde_json::from_slice(&message.payload).ok()
    }

    /// The steps of every build as they are told from now on: one subscription for a whole process.
    pub async fn progress(&self) -> Result<impl Stream<Item = (BuildId, Progress)> + use<>, BusError> {
        let told = self
            .shared
            .bus
            .client
            .subscribe(subject::PROGRESS_SUBJECTS)
            .await
            .map_err(|error| BusError::unavailable(PROGRESS, error))?;
        // What can't be read is of another release: there is nothing to show of it.
        Ok(told.filter_map(|message| async move {
            let id = subject::parse_build_suffix(&message.subject).ok()?;
            Some((id, serde_json::from_slice(&message.payload).ok()?))
        }))
    }
}
