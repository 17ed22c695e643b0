//! Whether the journal has room for a further build: looked at also while nobody asks for one, so that it is told before.

use std::time::Duration;

use crate::Shared;

const LOOK: Duration = Duration::from_secs(5);

/// Looks again and again; ends when it is dropped.
pub(crate) async fn watch(shared: &Shared) {
    loop {
        // It tells the process's keeper. A journal that can't be asked says nothing of its room.
        let _ = shared.journal.refuses(shared.view.active().len()).await;
        tokio::time::sleep(LOOK).await;
    }
}
