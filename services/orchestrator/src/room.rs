//! Whether the journal has room for a further build: looked at also while nobody asks for one, so that it is told before.

use std::time::Duration;

use crate::Shared;

const LOOK: Duration = Duration::from_secs(5);

/// Looks again and again; ends when it is dropped.
pub(crate) async fn watch(shared: &Shared) {
    loop {
        shared.journal.tell_room(shared.view.active().len()).await;
        tokio::time::sleep(LOOK).await;
    }
}
