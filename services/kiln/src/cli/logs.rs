//! `kiln logs`: a build's log as its bytes.

use futures::StreamExt as _;

use super::connection::{Connection, Gateway};
use super::failure::{Exit, Failure};
use super::id;
use super::json::LogJson;
use super::output::{Output, OutputArgs, say};
use super::stream::{self, Item, Start};

pub(super) const EXAMPLES: &str = "\
Examples:
  kiln logs 4f45d02e                   what there is, of the build whose id begins so
  kiln logs -f 4f45d02e                … and what follows, until the log is complete
  kiln logs --tail 4096 4f45d02e       at most the newest 4096 bytes
  kiln logs --offset 70000 4f45d02e    from a byte on
  kiln logs -o json 4f45d02e           {\"type\":\"log\",\"offset\":0,\"length\":6,\"text\":\"hello\\n\",\"complete\":false}
                                       (\"base64\" has the exact bytes where they aren't UTF-8)

The bytes are the builder's, control characters and all. A connection that breaks is made anew, and reading
goes on at the byte where it broke off.";

/// Options of `kiln logs`.
#[derive(Debug, clap::Args)]
pub(crate) struct LogsArgs {
    /// A build's id, or so much of its beginning as no other shares
    id: String,
    /// Go on until the log is complete
    #[arg(long, short)]
    follow: bool,
    /// Begin so many bytes before the end
    #[arg(long, value_name = "BYTES", conflicts_with = "offset")]
    tail: Option<u64>,
    /// Begin at this byte
    #[arg(long, value_name = "N")]
    offset: Option<u64>,
    #[command(flatten)]
    connection: Connection,
    #[command(flatten)]
    output: OutputArgs,
}

pub(super) async fn run(args: LogsArgs) -> Result<Exit, Failure> {
    let gateway = Gateway::connect(&args.connection).await?;
    let id = id::find(&gateway, &args.id).await?;
    let start = match (args.offset, args.tail) {
        (Some(offset), _) => Start::Offset(offset),
        (None, Some(bytes)) => Start::Tail(bytes),
        (None, None) => Start::Beginning,
    };
    let mut output = Output::new(&args.output);
    let mut log = stream::log(&gateway, &id, start, args.follow);
    while let Some(item) = log.next().await {
        match item? {
            Item::New(piece) if output.is_json() => output.json(&LogJson::from(&piece)).await?,
            Item::New(piece) => output.bytes(&piece.content).await?,
            Item::Broken(failure) => say(&format!("{failure}; trying again")),
        }
    }
    Ok(Exit::Done)
}
