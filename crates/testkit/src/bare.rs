//! NATS and nothing else: what figures of the bus are held against.

use std::time::Duration;

use anyhow::{Context as _, Result};
use async_nats::jetstream;
use async_nats::jetstream::consumer::pull::OrderedConfig;
use async_nats::jetstream::stream::Republish;
use bytes::Bytes;
use futures::StreamExt as _;
use tokio::time::Instant;

const STREAM: &str = "TESTKIT_BARE";

/// How long `messages` take to be stored, each acknowledged before the next is sent, in a stream that is set up as `like` is.
pub async fn publish(url: &str, like: &str, messages: &[Bytes]) -> Result<Duration> {
    let took = publish_beside(url, like, messages).await?;
    let js = jetstream::new(async_nats::connect(url).await?);
    js.delete_stream(STREAM).await?;
    Ok(took)
}

/// The same, with a stream that stays: several may do it at once.
pub async fn publish_beside(url: &str, like: &str, messages: &[Bytes]) -> Result<Duration> {
    let js = jetstream::new(async_nats::connect(url).await?);
    let mut config = js.get_stream(like).await?.cached_info().config.clone();
    config.name = STREAM.into();
    config.subjects = vec!["testkit.bare.>".into()];
    config.republish = config.republish.map(|_| Republish {
        source: "testkit.bare.>".into(),
        destination: "testkit.live.>".into(),
        headers_only: false,
    });
    js.create_stream(config).await.context("make a stream beside")?;
    let begun = Instant::now();
    for message in messages {
        js.publish("testkit.bare.log", message.clone()).await?.await?;
    }
    Ok(begun.elapsed())
}

/// Reads all messages of a subject in order, as they come: how many bytes, and how long that takes.
pub async fn consume(url: &str, stream: &str, subject: &str) -> Result<(u64, Duration)> {
    let js = jetstream::new(async_nats::connect(url).await?);
    let stream = js.get_stream(stream).await?;
    let begun = Instant::now();
    let config = OrderedConfig { filter_subject: subject.to_owned(), ..OrderedConfig::default() };
    let mut messages = stream.create_consumer(config).await?.messages().await?;
    let mut bytes = 0;
    while let Some(message) = messages.next().await {
        let message = message?;
        bytes += message.payload.len() as u64;
        if message.info().map_err(|error| anyhow::anyhow!(error))?.pending == 0 {
            break;
        }
    }
    Ok((bytes, begun.elapsed()))
}
