//! `grpc_server_handled_total`, as mk3 counted it: each call once, a stream when it is over, by the code that it ended with.

use std::pin::Pin;
use std::task::{Context, Poll};

use futures::Stream;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;
use tonic::{Code, Response, Status};

use crate::builds::Answers;

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Labels {
    grpc_type: &'static str,
    grpc_service: &'static str,
    grpc_method: &'static str,
    grpc_code: &'static str,
}

#[derive(Clone, Default)]
pub(crate) struct Handled(Family<Labels, Counter>);

impl Handled {
    /// The name has no prefix of ours: dashboards and alerts know it.
    pub(crate) fn register(registry: &mut Registry) -> Self {
        let handled = Self::default();
        let help = "Calls of builder.ImageBuilder that are over, by their code";
        registry.register("grpc_server_handled", help, handled.0.clone());
        handled
    }

    pub(crate) fn unary<T>(
        &self,
        method: &'static str,
        answer: Result<Response<T>, Status>,
    ) -> Result<Response<T>, Status> {
        self.count("unary", method, answer.as_ref().err().map_or(Code::Ok, Status::code));
        answer
    }

    pub(crate) fn stream<T: Send + 'static>(
        &self,
        method: &'static str,
        answer: Result<Response<Answers<T>>, Status>,
    ) -> Result<Response<Answers<T>>, Status> {
        match answer {
            Ok(answer) => Ok(answer.map(|inner| {
                // Dropped before its end: its client is gone.
                let counted = Counted { inner, handled: self.clone(), method, code: Code::Cancelled };
                Box::pin(counted) as Answers<T>
            })),
            Err(status) => {
                self.count("server_stream", method, status.code());
                Err(status)
            }
        }
    }

    fn count(&self, grpc_type: &'static str, grpc_method: &'static str, code: Code) {
        let grpc_code = go_name(code);
        let labels = Labels { grpc_type, grpc_service: "builder.ImageBuilder", grpc_method, grpc_code };
        self.0.get_or_create(&labels).inc();
    }
}

/// A stream that is counted when it is dropped.
struct Counted<T> {
    inner: Answers<T>,
    handled: Handled,
    method: &'static str,
    code: Code,
}

impl<T> Stream for Counted<T> {
    type Item = Result<T, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let item = self.inner.as_mut().poll_next(context);
        match &item {
            Poll::Ready(None) if self.code == Code::Cancelled => self.code = Code::Ok,
            Poll::Ready(Some(Err(status))) => self.code = status.code(),
            _ => {}
        }
        item
    }
}

impl<T> Drop for Counted<T> {
    fn drop(&mut self) {
        self.handled.count("server_stream", self.method, self.code);
    }
}

/// As Go's gRPC spells it.
fn go_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "Canceled",
        Code::Unknown => "Unknown",
        Code::InvalidArgument => "InvalidArgument",
        Code::DeadlineExceeded => "DeadlineExceeded",
        Code::NotFound => "NotFound",
        Code::AlreadyExists => "AlreadyExists",
        Code::PermissionDenied => "PermissionDenied",
        Code::ResourceExhausted => "ResourceExhausted",
        Code::FailedPrecondition => "FailedPrecondition",
        Code::Aborted => "Aborted",
        Code::OutOfRange => "OutOfRange",
        Code::Unimplemented => "Unimplemented",
        Code::Internal => "Internal",
        Code::Unavailable => "Unavailable",
        Code::DataLoss => "DataLoss",
        Code::Unauthenticated => "Unauthenticated",
    }
}

#[cfg(test)]
mod tests {
    use futures::{StreamExt as _, stream};

    use super::*;

    #[tokio::test]
    async fn every_call_is_counted_once_by_how_it_ended() {
        let mut registry = Registry::default();
        let handled = Handled::register(&mut registry);
        let answers = |items: Vec<Result<u8, Status>>| -> Result<Response<Answers<u8>>, Status> {
            Ok(Response::new(Box::pin(stream::iter(items))))
        };
        let whole = handled.stream("Build", answers(vec![Ok(1)])).unwrap().into_inner();
        assert_eq!(whole.count().await, 1);
        let failing = vec![Ok(1), Err(Status::unavailable("x"))];
        assert_eq!(handled.stream("Build", answers(failing)).unwrap().into_inner().count().await, 2);
        let mut left = handled.stream("Build", answers(vec![Ok(1), Ok(2)])).unwrap().into_inner();
        assert!(left.next().await.is_some());
        drop(left);
        assert!(handled.stream::<u8>("Build", Err(Status::internal("x"))).is_err());
        assert!(handled.unary("ListBuilds", Ok(Response::new(()))).is_ok());
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        for (kind, method, code) in [
            ("server_stream", "Build", "OK"),
            ("server_stream", "Build", "Unavailable"),
            ("server_stream", "Build", "Canceled"),
            ("server_stream", "Build", "Internal"),
            ("unary", "ListBuilds", "OK"),
        ] {
            let labels = format!(
                "grpc_type=\"{kind}\",grpc_service=\"builder.ImageBuilder\",grpc_method=\"{method}\",grpc_code=\"{code}\""
            );
            assert!(text.contains(&format!("grpc_server_handled_total{{{labels}}} 1\n")), "{labels}\n{text}");
        }
    }
}
