//! The streams and buckets, made or brought up to date by this one place. Several processes may do it at once.

use std::time::Duration;

use async_nats::jetstream::context::{CreateStreamError, CreateStreamErrorKind};
use async_nats::jetstream::{kv, stream};
use kiln_contract::{bucket, subject};
use kiln_domain::limits;

use crate::connection::Bus;
use crate::error::BusError;
use crate::room;

/// What an installation may choose of its streams.
#[derive(Clone, Debug)]
pub struct Layout {
    /// 1 on one node, 3 on a cluster.
    pub replicas: usize,
    pub journal_max_bytes: i64,
    pub logs_max_bytes: i64,
    pub logs_max_age: Duration,
}

impl Default for Layout {
    fn default() -> Self {
        Self {
            replicas: 1,
            journal_max_bytes: 4 << 30,
            logs_max_bytes: 32 << 30,
            logs_max_age: Duration::from_secs(7 * DAY),
        }
    }
}

/// How long streams are tried to be made.
const PATIENCE: Duration = Duration::from_secs(5);

const DAY: u64 = 24 * 60 * 60;

impl Bus {
    /// Creates what is missing and updates what differs. An error names the stream or bucket, and why it can't be changed.
    /// Where another process makes them at the same moment, and in a
    /// cluster that is too young to have a place for them, it is refused for a while: it is tried for some seconds.
    pub async fn provision(&self, layout: &Layout) -> Result<(), BusError> {
        let give_up = tokio::time::Instant::now() + PATIENCE;
        let mut said = String::new();
        loop {
            match self.try_provision(layout).await {
                Err(error) if tokio::time::Instant::now() < give_up => {
                    let error = error.to_string();
                    if said != error {
                        tracing::warn!("trying again for some seconds: {error}");
                        said = error;
                    }
                    tokio::time::sleep(Duration::from_millis(200)).await;
                }
                decided => return decided,
            }
        }
    }

    async fn try_provision(&self, layout: &Layout) -> Result<(), BusError> {
        let refused = |detail| BusError::Refused { operation: "provision", detail };
        for config in streams(layout) {
            let name = config.name.clone();
            let made = async {
                let Err(why) = self.js.create_stream(config.clone()).await else { return Ok(()) };
                let with_advice = |error: &CreateStreamError, says: String| match room::lacking(error) {
                    true => format!("{says}; {}", room::advice(&name, layout)),
                    false => says,
                };
                // It exists, made otherwise; or another process makes it now.
                match self.js.update_stream(config).await {
                    Ok(_) => Ok(()),
                    Err(error) if error.kind() == CreateStreamErrorKind::NotFound => {
                        Err(with_advice(&why, format!("it can't be made: {why}")))
                    }
                    Err(error) => Err(with_advice(
                        &error,
                        format!("it is there, and can't be changed to these settings: {error}"),
                    )),
                }
            };
            made.await.map_err(|why| refused(format!("stream {name}: {why}")))?;
        }
        for config in buckets(layout) {
            let name = config.bucket.clone();
            let made = self.js.create_or_update_key_value(config).await;
            made.map_err(|error| {
                let mut says =
                    format!("bucket {name}: it can't be made, or changed to these settings: {error}");
                if room::lacking(&error) {
                    says = format!("{says}; {}", room::advice(&bucket::stream(&name), layout));
                }
                refused(says)
            })?;
        }
        Ok(())
    }
}

pub(crate) fn streams(layout: &Layout) -> [stream::Config; 4] {
    let file = stream::Config {
        storage: stream::StorageType::File,
        num_replicas: layout.replicas,
        ..Default::default()
    };
    [
        stream::Config {
            name: subject::JOURNAL_STREAM.into(),
            description: Some("The history of every build; its last event is its state".into()),
            subjects: vec![subject::JOURNAL_SUBJECTS.into()],
            discard: stream::DiscardPolicy::New,
            max_age: Duration::from_secs(30 * DAY),
            max_bytes: layout.journal_max_bytes,
            allow_direct: true,
            duplicate_window: Duration::from_secs(120),
            ..file.clone()
        },
        stream::Config {
            name: subject::EVENTS_STREAM.into(),
            description: Some("A mirror of the journal for other subscribers".into()),
            mirror: Some(stream::Source { name: subject::JOURNAL_STREAM.into(), ..Default::default() }),
            max_age: Duration::from_secs(30 * DAY),
            max_bytes: layout.journal_max_bytes,
            allow_direct: true,
            ..file.clone()
        },
        stream::Config {
            name: subject::LOGS_STREAM.into(),
            description: Some("The log of every build, masked".into()),
            subjects: vec![subject::LOG_SUBJECTS.into()],
            discard: stream::DiscardPolicy::Old,
            max_age: layout.logs_max_age,
            max_bytes: layout.logs_max_bytes,
            max_consumers: 32,
            allow_direct: true,
            // nats-server 2.15.1 can't read a compressed block any more after it was killed ("s2: unsupported input"): the stream
            // lost its quorum for good on two of three servers. Disks can compress what is worth it.
            compression: Some(stream::Compression::None),
            duplicate_window: Duration::from_secs(60),
            republish: Some(stream::Republish {
                source: subject::LOG_SUBJECTS.into(),
                destination: subject::LIVE_LOG_DESTINATION.into(),
                headers_only: false,
            }),
            ..file.clone()
        },
        stream::Config {
            name: subject::PROGRESS_STREAM.into(),
            description: Some("The running step of every build".into()),
            subjects: vec![subject::PROGRESS_SUBJECTS.into()],
            storage: stream::StorageType::Memory,
            discard: stream::DiscardPolicy::Old,
            max_messages_per_subject: 1,
            max_age: Duration::from_secs(DAY),
            max_bytes: 64 << 20,
            allow_direct: true,
            num_replicas: layout.replicas,
            ..Default::default()
        },
    ]
}

pub(crate) fn buckets(layout: &Layout) -> [kv::Config; 4] {
    let file = kv::Config { history: 1, num_replicas: layout.replicas, ..Default::default() };
    [
        kv::Config {
            bucket: bucket::HOLDERS.into(),
            description: "Which instances live".into(),
            limit_markers: Some(Duration::from_secs(60)),
            ..file.clone()
        },
        kv::Config {
            bucket: bucket::SECRETS.into(),
            description: "Sealed secrets; its keys are the builds that are not cleaned up yet".into(),
            // Each attempt has the longest wait and the longest timeout.
            max_age: limits::LONGEST * (2 * limits::ATTEMPTS) + Duration::from_secs(DAY),
            ..file.clone()
        },
        kv::Config {
            bucket: bucket::REVOCATIONS.into(),
            description: "Runs that must not be started any more".into(),
            // Above any time for which a start may be under way.
            max_age: Duration::from_secs(2 * DAY),
            ..file.clone()
        },
        kv::Config {
            bucket: bucket::REFS.into(),
            description: "The resolver's answers".into(),
            max_age: Duration::from_secs(DAY),
            max_bytes: 256 << 20,
            ..file
        },
    ]
}
