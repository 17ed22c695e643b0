//! gRPC and nothing else: streams that are fed from a broadcast channel, by a process of its own.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, Result};
use futures::stream::BoxStream;
use futures::{FutureExt as _, StreamExt as _};
use kiln_proto::kiln_v1::{BuildLogsRequest, LogChunk};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::net::TcpListener;
use tokio::process::{Child, Command};
use tokio::sync::broadcast;
use tonic::body::Body;
use tonic::codegen::{BoxFuture, Context, Poll, Service, http};
use tonic::server::{NamedService, ServerStreamingService};
use tonic::transport::Channel;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status, Streaming};
use tonic_prost::ProstCodec;

/// What makes this program the server; the number of streams, of messages and of bytes in each follow.
pub(crate) const ARGUMENT: &str = "--bare-server";
const PATH: &str = "/bare.Feed/Follow";
/// Messages that a stream may be behind, as in Kiln.
const RING: usize = 64;

#[derive(Clone)]
struct Feed(broadcast::Sender<Vec<u8>>);

/// Feeds all streams once that many are there, as fast as the slowest takes it, and then ends them.
pub(crate) async fn serve(arguments: &[String]) -> Result<()> {
    let numbers: Vec<usize> =
        arguments.iter().take(3).map(|number| number.parse()).collect::<Result<_, _>>()?;
    let &[streams, messages, size] = &numbers[..] else { anyhow::bail!("three numbers are needed") };
    let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
    println!("{}", listener.local_addr()?);
    let feed = broadcast::Sender::new(RING);
    let service = Feed(feed.clone());
    let feeding = async move {
        while feed.receiver_count() < streams {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        for _ in 0..messages {
            while feed.len() >= RING / 2 {
                tokio::time::sleep(Duration::from_micros(200)).await;
            }
            feed.send(vec![b'x'; size])?;
        }
        // An empty one is the end, as in Kiln.
        feed.send(Vec::new())?;
        std::future::pending::<()>().await;
        anyhow::Ok(())
    };
    let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
    let serving = tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming);
    tokio::select! {
        served = serving => Ok(served?),
        fed = feeding => fed,
    }
}

impl NamedService for Feed {
    const NAME: &'static str = "bare.Feed";
}

impl Service<http::Request<Body>> for Feed {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Infallible>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let feed = self.clone();
        Box::pin(async move {
            let codec = ProstCodec::<LogChunk, BuildLogsRequest>::default();
            Ok(tonic::server::Grpc::new(codec).server_streaming(feed, request).await)
        })
    }
}

impl ServerStreamingService<BuildLogsRequest> for Feed {
    type Response = LogChunk;
    type ResponseStream = BoxStream<'static, Result<LogChunk, Status>>;
    type Future = BoxFuture<Response<Self::ResponseStream>, Status>;

    fn call(&mut self, _: Request<BuildLogsRequest>) -> Self::Future {
        let fed = futures::stream::unfold((self.0.subscribe(), false), async |(mut feed, over)| {
            if over {
                return None;
            }
            let content = match feed.recv().await {
                Ok(content) => content,
                Err(error) => return Some((Err(Status::data_loss(error.to_string())), (feed, true))),
            };
            let complete = content.is_empty();
            Some((Ok(LogChunk { content, offset: 0, complete }), (feed, complete)))
        });
        async { Ok(Response::new(fed.boxed())) }.boxed()
    }
}

/// The server as a process, and its address.
pub(crate) async fn start(streams: usize, messages: usize, size: usize) -> Result<(Child, SocketAddr)> {
    let numbers = [streams, messages, size].map(|number| number.to_string());
    let mut child = Command::new(std::env::current_exe()?)
        .arg(ARGUMENT)
        .args(numbers)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    let mut lines = BufReader::new(child.stdout.take().context("its stdout")?).lines();
    let address = lines.next_line().await?.context("the bare server does not begin")?.parse()?;
    Ok((child, address))
}

pub(crate) async fn follow(channel: Channel) -> Result<Streaming<LogChunk>> {
    let mut client = tonic::client::Grpc::new(channel);
    client.ready().await?;
    let codec = ProstCodec::<BuildLogsRequest, LogChunk>::default();
    let request = Request::new(BuildLogsRequest::default());
    Ok(client.server_streaming(request, PATH.parse()?, codec).await?.into_inner())
}
