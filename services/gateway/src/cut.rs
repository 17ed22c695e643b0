//! What ends a stream before its own end, by whatever protocol it is read. A client that was cut off goes on from where it is.

use std::time::Duration;

use futures::{Stream, StreamExt as _};
use kiln_domain::id::BuildId;
use tokio_util::sync::CancellationToken;

use crate::presence::Presence;

/// Why a stream ended before its end.
#[derive(Clone, Debug, thiserror::Error)]
pub(crate) enum Cut {
    #[error("this gateway is shutting down; ask again from where you are")]
    Stopping,
    #[error("the bus has been away for {0:?}; ask again from where you are")]
    BusAway(Duration),
    /// It was known, and now the journal doesn't know it.
    #[error(
        "build {0} is lost: the journal was deleted, emptied or restored; its builder is ended, ask for the image again"
    )]
    Lost(BuildId),
}

/// What cuts every stream of this gateway; clones share it.
#[derive(Clone)]
pub(crate) struct Cuts {
    pub(crate) stop: CancellationToken,
    pub(crate) presence: Presence,
}

impl Cuts {
    /// Returns when streams are to end.
    pub(crate) fn cut(&self) -> impl Future<Output = Cut> + Send + use<> {
        let Self { stop, presence } = self.clone();
        async move {
            tokio::select! {
                () = stop.cancelled() => Cut::Stopping,
                away = presence.lost() => Cut::BusAway(away),
            }
        }
    }
}

/// Ends a stream once `cut` says why, and after its first error.
pub(crate) fn until_cut<T, E>(
    stream: impl Stream<Item = Result<T, E>> + Send + 'static,
    cut: impl Future<Output = Cut> + Send + 'static,
) -> impl Stream<Item = Result<T, E>> + Send + 'static
where
    T: Send + 'static,
    E: From<Cut> + Send + 'static,
{
    let ended = futures::stream::once(async move { Err(cut.await.into()) });
    // The first error ends it, and so does the stream's own end.
    let items = stream.map(Some).chain(futures::stream::once(async { None }));
    let merged = futures::stream::select(items, ended.map(Some));
    let mut over = false;
    merged
        .take_while(move |item| {
            let goes_on = !over && item.is_some();
            over = over || matches!(item, Some(Err(_)));
            futures::future::ready(goes_on)
        })
        .filter_map(futures::future::ready)
}
