//! The one moment in which a builder is not stopped: while it PUTs the target.
//!
//! Who drops a request that is under way does not take it back: the registry may apply it at any time later. So whoever is
//! told that a run is stopped must be told so after that.

use std::io;
use std::sync::Arc;

use tokio::sync::{Mutex, OwnedMutexGuard};

/// Either an attempt to PUT is under way, or the builder may be stopped.
#[derive(Clone, Default)]
pub(crate) struct Put(Arc<Mutex<()>>);

impl Put {
    /// What is to be held for one attempt; an error once the builder is being stopped.
    pub(crate) fn begin(&self) -> io::Result<OwnedMutexGuard<()>> {
        Arc::clone(&self.0).try_lock_owned().map_err(|_| io::Error::other("the builder is being stopped"))
    }

    pub(crate) fn is_under_way(&self) -> bool {
        self.0.try_lock().is_err()
    }

    /// Waits until no attempt is under way. None begins while the result lives.
    pub(crate) async fn no_more(&self) -> OwnedMutexGuard<()> {
        Arc::clone(&self.0).lock_owned().await
    }
}
