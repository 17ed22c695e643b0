//! In TLS 1.3 a server refuses a client's certificate after the client believes the connection made, and HTTP/2 tells its
//! callers no more than that it is closed: so what ends a connection is said here.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// A connection that says what ends it.
pub(crate) struct Alerting<S>(pub(crate) S);

impl<S: AsyncRead + Unpin> AsyncRead for Alerting<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let read = Pin::new(&mut self.0).poll_read(context, buffer);
        // What TLS has against the other's messages, and an alert of the other's.
        if let Poll::Ready(Err(error)) = &read
            && error.kind() == io::ErrorKind::InvalidData
        {
            tracing::warn!(
                "ws-manager's connection is over: {error}; is our certificate one that it admits?"
            );
        }
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Alerting<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(context)
    }
}
