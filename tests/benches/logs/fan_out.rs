//! One build that many follow: messages a second, all followers together.
//!
//! Each message is stored before it is sent, as in use: with few followers it is the appends that set the pace, not the
//! gateway.

use std::time::Instant;

use anyhow::{Result, ensure};
use bytes::Bytes;
use kiln_proto::kiln_v1::LogChunk;
use tokio::task::JoinSet;
use tonic::Streaming;
use tonic::transport::Channel;

use crate::Scale;
use crate::bare;
use crate::plant::{Plant, append, follow, to_the_end};

const CONNECTIONS: usize = 10;
const ROUNDS: usize = 3;

pub(crate) async fn run(plant: &mut Plant, scale: Scale) -> Result<()> {
    let followers = scale.of(1_000, 50);
    let messages = scale.of(1_000, 200);
    for size in [512, 16 * 1024] {
        let messages = if size > 512 { messages / 8 } else { messages };
        let (mut kiln, mut alone, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            kiln.push(through(plant, followers, messages, size).await?);
            alone.push(without(followers, messages, size).await?);
            ratios.push(kiln[kiln.len() - 1] / alone[alone.len() - 1]);
        }
        for figures in [&mut kiln, &mut alone, &mut ratios] {
            figures.sort_by(f64::total_cmp);
        }
        println!(
            "fan-out, {followers} followers of one build over {CONNECTIONS} connections, {size} bytes a message: {:.0} messages/s; \
             bare gRPC streams {:.0}; ratio p50 {:.2}, from {:.2} to {:.2} (aim: at least 0.6)",
            kiln[ROUNDS / 2],
            alone[ROUNDS / 2],
            ratios[ROUNDS / 2],
            ratios[0],
            ratios[ROUNDS - 1]
        );
    }
    Ok(())
}

async fn through(plant: &mut Plant, followers: usize, messages: usize, size: usize) -> Result<f64> {
    let build = plant.build().await?;
    let mut writer = plant.writer(&build).await?;
    let mut clients = plant.clients(CONNECTIONS).await?;
    let mut logs = Vec::new();
    append(&mut writer, Bytes::from_static(b"begun"), false).await?;
    for number in 0..followers {
        let mut log = follow(&mut clients[number % CONNECTIONS], &build.id, None).await?;
        // It follows: what comes from now on comes live.
        ensure!(log.message().await?.is_some(), "a log ended");
        logs.push(log);
    }
    let reading = read(logs);
    let writing = async {
        for _ in 0..messages {
            append(&mut writer, vec![b'x'; size].into(), false).await?;
        }
        append(&mut writer, Bytes::new(), true).await
    };
    let (rate, written) = tokio::join!(reading, writing);
    written?;
    rate
}

async fn without(followers: usize, messages: usize, size: usize) -> Result<f64> {
    let (_server, address) = bare::start(followers, messages, size).await?;
    let mut channels = Vec::new();
    for _ in 0..CONNECTIONS {
        channels.push(Channel::from_shared(format!("http://{address}"))?.connect().await?);
    }
    let mut logs = Vec::new();
    for number in 0..followers {
        logs.push(bare::follow(channels[number % CONNECTIONS].clone()).await?);
    }
    read(logs).await
}

/// Messages a second, from now to the end of the last of them.
async fn read(logs: Vec<Streaming<LogChunk>>) -> Result<f64> {
    let begun = Instant::now();
    let mut readers: JoinSet<_> = logs.into_iter().map(to_the_end).collect();
    let mut all = 0;
    while let Some(read) = readers.join_next().await {
        all += read??.0;
    }
    Ok(all as f64 / begun.elapsed().as_secs_f64())
}
