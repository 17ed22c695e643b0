//! The streams of builds as they lie on the server, read whole and past Kiln's own code.

use anyhow::{Context as _, Result};
use async_nats::jetstream::stream::RawMessageErrorKind;
use futures::StreamExt as _;
use jiff::Timestamp;
use kiln_contract::header::cloudevents;
use kiln_contract::subject;
use kiln_domain::id::BuildId;
use kiln_domain::record::Record;

/// An event of a build as it was stored.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    pub sequence: u64,
    pub stored_at: Timestamp,
    pub build: BuildId,
    /// `queued`, `claimed` and so on.
    pub name: String,
    /// `ce-source`: who appended it.
    pub source: String,
    /// The record after it, without what only a reader fills in.
    pub record: Record,
}

/// Every event that a stream of builds holds (`KILN_BUILDS` or its mirror `KILN_EVENTS`), oldest first, by its leader's
/// word. `url`: the servers, with commas between.
pub async fn events(url: &str, stream: &str) -> Result<Vec<Event>> {
    let servers = url.split(',').map(str::parse).collect::<Result<Vec<async_nats::ServerAddr>, _>>()?;
    let js = async_nats::jetstream::new(async_nats::connect(servers).await?);
    let stream = js.get_stream(stream).await?;
    let state = stream.cached_info().state.clone();
    let mut events = Vec::new();
    for sequence in state.first_sequence..=state.last_sequence {
        let message = match stream.get_raw_message(sequence).await {
            Ok(message) => message,
            Err(error) if error.kind() == RawMessageErrorKind::NoMessageFound => continue,
            Err(error) => return Err(error.into()),
        };
        let (build, name) = subject::parse_event(&message.subject)?;
        let source = message.headers.get(cloudevents::SOURCE).map(ToString::to_string);
        events.push(Event {
            sequence,
            stored_at: Timestamp::from_nanosecond(message.time.unix_timestamp_nanos())?,
            build,
            name: name.to_owned(),
            source: source.context("an event without a source")?,
            record: serde_json::from_slice(&message.payload)?,
        });
    }
    Ok(events)
}

/// Begins to listen, and returns what ends once somebody publishes to `subject`, whether a stream takes it or not.
pub async fn next_try(url: &str, subject: &str) -> Result<impl Future<Output = Result<()>> + use<>> {
    let client = async_nats::connect(url).await?;
    let mut tries = client.subscribe(subject.to_owned()).await?;
    client.flush().await?;
    Ok(async move {
        tries.next().await.context("the connection ended")?;
        drop(client);
        Ok(())
    })
}
