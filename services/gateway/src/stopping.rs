//! A gateway that is to end ends its streams, so that their clients go on at another.

use futures::{Stream, StreamExt as _};
use tokio_util::sync::CancellationToken;

/// Why a stream ended before its end.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("this gateway is shutting down; ask again from where you are")]
pub(crate) struct Stopping;

/// Ends a stream with [`Stopping`] when `stop` is cancelled, and after its first error.
pub(crate) fn until_stopped<T, E>(
    stream: impl Stream<Item = Result<T, E>> + Send + 'static,
    stop: CancellationToken,
) -> impl Stream<Item = Result<T, E>> + Send + 'static
where
    T: Send + 'static,
    E: From<Stopping> + Send + 'static,
{
    let stopped = futures::stream::once(async move {
        stop.cancelled().await;
        Err(Stopping.into())
    });
    // The first error ends it, and so does the stream's own end.
    let items = stream.map(Some).chain(futures::stream::once(async { None }));
    let merged = futures::stream::select(items, stopped.map(Some));
    let mut over = false;
    merged
        .take_while(move |item| {
            let goes_on = !over && item.is_some();
            over = over || matches!(item, Some(Err(_)));
            futures::future::ready(goes_on)
        })
        .filter_map(futures::future::ready)
}
