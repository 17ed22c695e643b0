//! The room that the streams reserve: nats-server makes a stream only where all that it may come to hold has room, on its
//! disk or in what its configuration lets it use of that, however little is stored.

use async_nats::jetstream::ErrorCode;
use async_nats::jetstream::account::Account;
use async_nats::jetstream::context::{CreateStreamError, CreateStreamErrorKind};
use async_nats::jetstream::stream::{Config, StorageType};
use kiln_contract::subject;
use kiln_domain::finding::Finding;

use crate::connection::Bus;
use crate::inspect::of_bucket;
use crate::layout::{Layout, buckets, streams};

const PART: &str = "nats jetstream";
const REMEDY: &str = "let nats-server have more (`max_file_store` of its `jetstream`, the account's limit, a larger disk), or \
     lower `streams.journal_max_bytes` and `streams.logs_max_bytes` for every role";

impl Bus {
    /// Whether the server lets the streams have what they reserve. Of an account without a limit it tells its own only by
    /// refusing: where some of them are `missing`, it is asked for one stream of their size, which is removed again.
    pub(crate) async fn inspect_room(
        &self,
        account: &Account,
        layout: &Layout,
        missing: &[Config],
    ) -> Finding {
        let wanted = reserved(&all(layout));
        let used = format!(
            "{} on disk, {} reserved for streams",
            size(account.storage),
            size(account.reserved_storage)
        );
        let limit = account.limits.max_storage.and_then(|limit| u64::try_from(limit).ok());
        match limit.filter(|limit| *limit > 0) {
            Some(limit) if limit < wanted => {
                let says =
                    format!("the account may use {}, and the streams reserve {}", size(limit), size(wanted));
                return Finding::problem(PART, says, REMEDY);
            }
            Some(limit) => return Finding::ok(PART, format!("{used}; the account may use {}", size(limit))),
            None => {}
        }
        match self.try_room(layout, reserved(missing)).await {
            Err(error) if lacking(&error) => Finding::problem(
                PART,
                format!(
                    "{used}; the server has no room for the {} that missing ones reserve, of {} in all: {error}",
                    size(reserved(missing)),
                    size(wanted)
                ),
                REMEDY,
            ),
            // Whatever else is wrong is said of the streams.
            _ => Finding::ok(PART, used),
        }
    }

    async fn try_room(&self, layout: &Layout, bytes: u64) -> Result<(), CreateStreamError> {
        if bytes == 0 {
            return Ok(());
        }
        let trial = Config {
            name: subject::TRIAL_STREAM.into(),
            description: Some("Made by `kiln doctor` for a moment: is there room?".into()),
            max_bytes: i64::try_from(bytes).unwrap_or(i64::MAX),
            num_replicas: layout.replicas,
            ..Config::default()
        };
        let made = self.js.create_stream(trial).await.map(|_| ());
        // Also what a doctor left that was killed in between.
        let _not_there = self.js.delete_stream(subject::TRIAL_STREAM).await;
        made
    }
}

/// What a stream that has no room is told besides: what it reserves, and by which setting.
pub(crate) fn advice(name: &str, layout: &Layout) -> String {
    let all = all(layout);
    let its = all.iter().filter(|stream| stream.name == name).filter_map(bytes).sum();
    let setting = match name {
        subject::JOURNAL_STREAM | subject::EVENTS_STREAM => " (`streams.journal_max_bytes`)",
        subject::LOGS_STREAM => " (`streams.logs_max_bytes`)",
        _ => "",
    };
    format!("it reserves {}{setting} of {} that all streams do: {REMEDY}", size(its), size(reserved(&all)))
}

/// Whether it was refused as there is no room for what a stream may come to hold.
pub(crate) fn lacking(error: &(dyn std::error::Error + 'static)) -> bool {
    const NO_ROOM: [ErrorCode; 5] = [
        ErrorCode::STORAGE_RESOURCES_EXCEEDED,
        ErrorCode::MEMORY_RESOURCES_EXCEEDED,
        ErrorCode::INSUFFICIENT_RESOURCES,
        ErrorCode::ACCOUNT_RESOURCES_EXCEEDED,
        ErrorCode::CLUSTER_NO_PEERS,
    ];
    std::iter::successors(Some(error), |error| error.source()).any(|error| {
        error.downcast_ref::<CreateStreamError>().is_some_and(|error| {
            matches!(error.kind(), CreateStreamErrorKind::JetStream(error) if NO_ROOM.contains(&error.error_code()))
        })
    })
}

fn all(layout: &Layout) -> Vec<Config> {
    streams(layout).into_iter().chain(buckets(layout).map(|bucket| of_bucket(bucket).1)).collect()
}

/// What streams reserve on disk.
fn reserved(streams: &[Config]) -> u64 {
    streams.iter().filter(|stream| stream.storage == StorageType::File).filter_map(bytes).sum()
}

fn bytes(stream: &Config) -> Option<u64> {
    u64::try_from(stream.max_bytes).ok()
}

/// `3.2 GiB`.
pub(crate) fn size(bytes: u64) -> String {
    const UNITS: [(u64, &str); 4] = [(1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"), (1, "B")];
    let (unit, name) = UNITS.into_iter().find(|(unit, _)| bytes >= *unit).unwrap_or((1, "B"));
    let tenths = bytes.saturating_mul(10) / unit;
    if tenths.is_multiple_of(10) {
        format!("{} {name}", tenths / 10)
    } else {
        format!("{}.{} {name}", tenths / 10, tenths % 10)
    }
}
