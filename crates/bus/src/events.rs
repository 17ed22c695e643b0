//! The events as others read them: from the mirror `KILN_EVENTS`, as the read-only user.

use async_nats::jetstream::consumer::DeliverPolicy;
use async_nats::jetstream::consumer::pull::OrderedConfig;
use futures::{Stream, StreamExt as _};
use jiff::Timestamp;
use kiln_contract::header::cloudevents;
use kiln_contract::subject;

use crate::error::BusError;

/// An event of a build as a subscriber sees it.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// `ce-type`.
    pub kind: String,
    /// `ce-subject`: the build's id.
    pub build: String,
    /// Its place in the stream; the next subscription may begin after it.
    pub sequence: u64,
    /// When the stream stored it.
    pub time: Timestamp,
    /// The build's record.
    pub data: serde_json::Value,
}

/// Where a subscription begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum From {
    /// With the oldest event that is kept.
    Beginning,
    /// With the next event.
    Now,
    /// After an event that was seen.
    After(u64),
}

const SUBSCRIBE: &str = "subscribe to the events";

/// Follows the events with the credentials in `url` (`nats://user:password@host:port`, as `endpoints.json` has it). The
/// stream heals itself over reconnects; an error ends it.
pub async fn subscribe(
    url: &str,
    from: From,
) -> Result<impl Stream<Item = Result<Event, BusError>> + use<>, BusError> {
    let unavailable = |error: &dyn std::fmt::Display| BusError::unavailable(SUBSCRIBE, error);
    let server: async_nats::ServerAddr = url.parse().map_err(|error| BusError::refused(SUBSCRIBE, error))?;
    // The default inbox prefix: the only one that the user may listen to.
    let mut options = async_nats::ConnectOptions::new().name("kiln events");
    if let (Some(user), Some(password)) = (server.username(), server.password()) {
        options = options.user_and_password(user.to_owned(), password.to_owned());
    }
    let client = options.connect(server).await.map_err(|error| unavailable(&error))?;
    let deliver_policy = match from {
        From::Beginning => DeliverPolicy::All,
        From::Now => DeliverPolicy::New,
        From::After(sequence) => {
            DeliverPolicy::ByStartSequence { start_sequence: sequence.saturating_add(1) }
        }
    };
    let consumer = async_nats::jetstream::new(client)
        .get_stream(subject::EVENTS_STREAM)
        .await
        .map_err(|error| unavailable(&error))?
        .create_consumer(OrderedConfig { deliver_policy, ..OrderedConfig::default() })
        .await
        .map_err(|error| unavailable(&error))?;
    let messages = consumer.messages().await.map_err(|error| unavailable(&error))?;
    Ok(messages.map(|message| {
        let message = message.map_err(|error| BusError::unavailable(SUBSCRIBE, error))?;
        let info = message.info().map_err(|error| BusError::malformed(SUBSCRIBE, error))?;
        let header = |name: &str| {
            message
                .headers
                .as_ref()
                .and_then(|headers| headers.get(name))
                .map(ToString::to_string)
                .unwrap_or_default()
        };
        Ok(Event {
            kind: header(cloudevents::TYPE),
            build: header(cloudevents::SUBJECT),
            sequence: info.stream_sequence,
            time: Timestamp::from_nanosecond(info.published.unix_timestamp_nanos())
                .map_err(|error| BusError::malformed(SUBSCRIBE, error))?,
            data: serde_json::from_slice(&message.payload)
                .map_err(|error| BusError::malformed(SUBSCRIBE, error))?,
        })
    }))
}
