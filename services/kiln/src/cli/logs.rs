//! `kiln logs`: a build's log as its bytes.

use std::time::Duration;

use futures::StreamExt as _;
use jiff::Timestamp;
use kiln_proto::kiln_v1::{BuildLogInfoRequest, LogInfo};

use super::connection::{Connection, Gateway, answer};
use super::failure::{Exit, Failure};
use super::id;
use super::json::{LogInfoJson, LogJson};
use super::output::{Output, OutputArgs, say, table};
use super::stream::{self, Item, Start};
use super::time;

pub(super) const EXAMPLES: &str = "\
Examples:
  kiln logs 4f45d02e                   what there is, of the build whose id begins so
  kiln logs -f 4f45d02e                … and what follows, until the log is complete
  kiln logs --tail 4096 4f45d02e       at most the newest 4096 bytes
  kiln logs --offset 70000 4f45d02e    from a byte on
  kiln logs --info 4f45d02e            how long it is, what is kept of it, and until when
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
    /// Say what there is of the log, and how long it is kept
    #[arg(long, conflicts_with_all = ["follow", "tail", "offset"])]
    info: bool,
    #[command(flatten)]
    connection: Connection,
    #[command(flatten)]
    output: OutputArgs,
}

pub(super) async fn run(args: LogsArgs) -> Result<Exit, Failure> {
    let gateway = Gateway::connect(&args.connection).await?;
    let id = id::find(&gateway, &args.id).await?;
    let mut output = Output::new(&args.output);
    if args.info {
        let request = BuildLogInfoRequest { id };
        let info = answer("asking for the log", gateway.builds().build_log_info(request)).await?;
        if output.is_json() {
            output.json(&LogInfoJson::from(&info)).await?;
        } else {
            output.line(&describe(&info, time::now())).await?;
        }
        return Ok(Exit::Done);
    }
    let start = match (args.offset, args.tail) {
        (Some(offset), _) => Start::Offset(offset),
        (None, Some(bytes)) => Start::Tail(bytes),
        (None, None) => Start::Beginning,
    };
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

/// What is to be said of a log, as a table.
fn describe(info: &LogInfo, now: Timestamp) -> String {
    let at = |at: &Option<prost_types::Timestamp>| {
        at.as_ref().and_then(|at| time::timestamp(at.seconds, at.nanos))
    };
    let ago = |at: Timestamp| format!("{at:.0} ({} ago)", time::age(time::between(at, now)));
    let ahead = |at: Timestamp| format!("{at:.0} (in {})", time::age(time::between(now, at)));
    let state = match (info.complete, info.limited) {
        (true, false) => "complete",
        (true, true) => "complete; cut at the size limit of one log",
        (false, false) => "growing",
        (false, true) => "cut at the size limit of one log; the build goes on",
    };
    let kept = if info.first_offset > 0 {
        format!("from byte {} on: retention has discarded what was before", info.first_offset)
    } else {
        "all of it".into()
    };
    let limit = (info.max_bytes > 0).then(|| format!("{} bytes a log", info.max_bytes));
    let max_age = info.max_age.as_ref().and_then(|age| u64::try_from(age.seconds).ok());
    let max_age = max_age.map(|seconds| format!("{} each byte", time::age(Duration::from_secs(seconds))));
    let all = (info.all_logs_max_bytes > 0).then(|| {
        let (bytes, max_bytes) = (info.all_logs_bytes, info.all_logs_max_bytes);
        format!("{bytes} bytes of {max_bytes}, beyond which the oldest go")
    });
    let rows = [
        ("id", Some(info.id.clone())),
        ("length", Some(format!("{} bytes", info.length))),
        ("state", Some(state.into())),
        ("kept", Some(kept)),
        ("chunks", Some(info.chunks.to_string())),
        ("first stored", at(&info.first_stored_at).map(ago)),
        ("last stored", at(&info.last_stored_at).map(ago)),
        ("first expires", at(&info.first_expires_at).map(ahead)),
        ("last expires", at(&info.last_expires_at).map(ahead)),
        ("size limit", limit),
        ("kept for", max_age),
        ("all logs", all),
    ];
    table(None, rows.into_iter().filter_map(|(name, value)| Some([name.to_owned(), value?])))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_of_a_log() {
        let at = |seconds| Some(prost_types::Timestamp { seconds, nanos: 0 });
        let whole = LogInfo {
            id: "id".into(),
            length: 1_206,
            chunks: 18,
            complete: true,
            first_stored_at: at(0),
            last_stored_at: at(60),
            first_expires_at: at(7_200),
            last_expires_at: at(7_260),
            max_bytes: 65_536,
            max_age: Some(prost_types::Duration { seconds: 7_200, nanos: 0 }),
            all_logs_bytes: 4_096,
            all_logs_max_bytes: 1_048_576,
            ..LogInfo::default()
        };
        let now = time::timestamp(120, 0).unwrap();
        assert_eq!(
            describe(&whole, now),
            "id             id\n\
             length         1206 bytes\n\
             state          complete\n\
             kept           all of it\n\
             chunks         18\n\
             first stored   1970-01-01T00:00:00Z (2m ago)\n\
             last stored    1970-01-01T00:01:00Z (1m ago)\n\
             first expires  1970-01-01T02:00:00Z (in 1h)\n\
             last expires   1970-01-01T02:01:00Z (in 1h)\n\
             size limit     65536 bytes a log\n\
             kept for       2h each byte\n\
             all logs       4096 bytes of 1048576, beyond which the oldest go"
        );
        let cut = LogInfo {
            first_offset: 70,
            complete: false,
            limited: true,
            last_expires_at: None,
            max_bytes: 0,
            max_age: None,
            all_logs_max_bytes: 0,
            ..whole
        };
        assert_eq!(
            describe(&cut, now),
            "id             id\n\
             length         1206 bytes\n\
             state          cut at the size limit of one log; the build goes on\n\
             kept           from byte 70 on: retention has discarded what was before\n\
             chunks         18\n\
             first stored   1970-01-01T00:00:00Z (2m ago)\n\
             last stored    1970-01-01T00:01:00Z (1m ago)\n\
             first expires  1970-01-01T02:00:00Z (in 1h)"
        );
    }
}
