//! Many builders that write lines at a steady rate: how long a line takes from its write to a follower.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use kiln_proto::kiln_v1::LogChunk;
use tokio::task::JoinSet;
use tonic::Streaming;

use crate::plant::{Plant, follow, processor};
use crate::{Scale, quantile};

const LINES_A_SECOND: u64 = 100;
const CONNECTIONS: usize = 10;
/// What is begun in the first second is not counted: connections and caches come to be.
const WARM: Duration = Duration::from_secs(1);

pub(crate) async fn run(plant: &mut Plant, scale: Scale) -> Result<()> {
    let count = scale.of(200, 5);
    let lasts = Duration::from_secs(scale.of(10, 3) as u64);
    let mut clients = plant.clients(CONNECTIONS).await?;
    let (mut readers, mut builds) = (JoinSet::new(), Vec::new());
    let clock = Instant::now();
    for number in 0..count {
        let mut build = plant.build().await?;
        let builder = plant.builder(&mut build).await?;
        let log = follow(&mut clients[number % CONNECTIONS], &build.id, None).await?;
        readers.spawn(lines(log, clock));
        builds.push((build, builder));
    }
    let pids = [
        plant.fleet.process("log-relay", 0)?.pid()?,
        plant.fleet.process("gateway", 0)?.pid()?,
        plant.fleet.nats.pid()?,
    ];
    let before = pids.map(processor);
    let begun = clock.elapsed();
    let mut tick = tokio::time::interval(Duration::from_millis(1000 / LINES_A_SECOND));
    while clock.elapsed() < begun + lasts {
        tick.tick().await;
        for (_, builder) in &mut builds {
            let line = format!("{:020} {}\n", clock.elapsed().as_micros(), "x".repeat(60));
            builder.write(line.as_bytes())?;
        }
    }
    let busy = clock.elapsed() - begun;
    let mut cores = Vec::new();
    for (pid, before) in pids.into_iter().zip(before) {
        cores.push((processor(pid)? - before?) / busy.as_secs_f64() * 100.0);
    }
    let mut ids = Vec::new();
    for (build, builder) in builds {
        plant.end(&build, builder).await?;
        ids.push(build.id);
    }
    let mut delays = Vec::new();
    while let Some(read) = readers.join_next().await {
        let warm = read??.into_iter().filter(|(written, _)| *written > begun + WARM);
        delays.extend(warm.map(|(_, delay)| delay));
    }
    delays.sort();
    let mut chunks = 0;
    for id in ids {
        chunks += plant.logs.info(&id).await?.context("no log")?.chunks;
    }
    println!(
        "delay, {count} builders at {LINES_A_SECOND} lines a second, from write to follower: p50 {:.0?} p99 {:.0?} max {:.0?} of {} lines (aim: p99 under 250 ms); \
         {:.0} chunks/s; of a core the relay took {:.0} %, the gateway {:.0} %, NATS {:.0} %",
        quantile(&delays, 0.5),
        quantile(&delays, 0.99),
        quantile(&delays, 1.0),
        delays.len(),
        chunks as f64 / busy.as_secs_f64(),
        cores[0],
        cores[1],
        cores[2]
    );
    Ok(())
}

/// When each line was written, by the clock, and how long it took to come here.
async fn lines(mut log: Streaming<LogChunk>, clock: Instant) -> Result<Vec<(Duration, Duration)>> {
    let (mut text, mut lines) = (Vec::new(), Vec::new());
    while let Some(chunk) = log.message().await? {
        let now = clock.elapsed();
        text.extend_from_slice(&chunk.content);
        while let Some(end) = text.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = text.drain(..=end).collect();
            let written = str::from_utf8(&line[..20])?.parse().map(Duration::from_micros)?;
            lines.push((written, now.saturating_sub(written)));
        }
    }
    Ok(lines)
}
