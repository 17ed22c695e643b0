//! A finished log, read from its begin, and near its end.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use kiln_bus::logs::CHUNK_BYTES;
use kiln_contract::subject;
use kiln_domain::id::BuildId;
use kiln_proto::kiln_v1::build_logs_request::Start;
use kiln_proto::kiln_v1::builds_client::BuildsClient;
use kiln_testkit::bare;
use tonic::transport::Channel;

use crate::plant::{Plant, append, follow, to_the_end};
use crate::{Scale, quantile};

const ROUNDS: usize = 3;
const TAILS: usize = 30;

pub(crate) async fn run(plant: &mut Plant, scale: Scale) -> Result<()> {
    let chunks = scale.of(1_024, 64);
    let long = written(plant, chunks).await?;
    let short = written(plant, 2).await?;
    let mut client = plant.clients(1).await?.remove(0);
    let length = (chunks * CHUNK_BYTES) as u64;
    let (mut kiln, mut alone, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let begun = Instant::now();
        let (_, bytes) = to_the_end(follow(&mut client, &long, None).await?).await?;
        ensure!(bytes == length, "{bytes} bytes of {length}");
        kiln.push(length as f64 / 1e6 / begun.elapsed().as_secs_f64());
        let (bytes, took) =
            bare::consume(&plant.fleet.nats.url(), subject::LOGS_STREAM, &subject::log(&long)).await?;
        ensure!(bytes == length, "{bytes} bytes of {length}");
        alone.push(length as f64 / 1e6 / took.as_secs_f64());
        ratios.push(kiln[kiln.len() - 1] / alone[alone.len() - 1]);
    }
    for figures in [&mut kiln, &mut alone, &mut ratios] {
        figures.sort_by(f64::total_cmp);
    }
    println!(
        "replay of a log of {} MiB: {:.0} MB/s; a bare ordered consumer {:.0} MB/s; ratio p50 {:.2}, from {:.2} to {:.2}",
        length >> 20,
        kiln[ROUNDS / 2],
        alone[ROUNDS / 2],
        ratios[ROUNDS / 2],
        ratios[0],
        ratios[ROUNDS - 1]
    );
    let (mut of_long, mut of_short) = (Vec::new(), Vec::new());
    for _ in 0..TAILS {
        of_long.push(tail(&mut client, &long).await?);
        of_short.push(tail(&mut client, &short).await?);
    }
    of_long.sort();
    of_short.sort();
    println!(
        "the newest 4096 bytes: of a log of {} MiB p50 {:.1?} p90 {:.1?}; of one of 128 KiB p50 {:.1?} p90 {:.1?} (aim: independent of the length)",
        length >> 20,
        quantile(&of_long, 0.5),
        quantile(&of_long, 0.9),
        quantile(&of_short, 0.5),
        quantile(&of_short, 0.9),
    );
    Ok(())
}

/// A complete log of that many chunks, none like another.
async fn written(plant: &mut Plant, chunks: usize) -> Result<BuildId> {
    let build = plant.build().await?;
    let mut writer = plant.writer(&build).await?;
    for number in 0..chunks {
        let line = format!("{number:08} of a build's output, as compilers write it\n");
        let mut chunk = line.repeat(CHUNK_BYTES / line.len() + 1).into_bytes();
        chunk.truncate(CHUNK_BYTES);
        append(&mut writer, chunk.into(), false).await?;
    }
    append(&mut writer, Bytes::new(), true).await?;
    Ok(build.id)
}

/// To the first message of the newest 4096 bytes.
async fn tail(client: &mut BuildsClient<Channel>, id: &BuildId) -> Result<Duration> {
    let begun = Instant::now();
    let mut log = follow(client, id, Some(Start::TailBytes(4_096))).await?;
    let chunk = log.message().await?.context("no tail")?;
    ensure!(chunk.content.len() == 4_096, "{} bytes", chunk.content.len());
    Ok(begun.elapsed())
}
