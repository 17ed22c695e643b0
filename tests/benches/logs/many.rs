//! Many builds that many follow, at a walk: memory of the gateway for each follower, and what NATS has to do.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Result, ensure};
use bytes::Bytes;
use kiln_bus::logs::LogWriter;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::Scale;
use crate::plant::{Plant, append, follow, processor, resident};

/// A server takes some hundred streams on a connection.
const STREAMS: usize = 100;
const FOLLOWERS: usize = 10;
const WRITERS: usize = 20;

pub(crate) async fn run(plant: &mut Plant, scale: Scale) -> Result<()> {
    let count = scale.of(1_000, 20);
    let lasts = Duration::from_secs(scale.of(10, 3) as u64);
    let mut builds = Vec::new();
    let mut writers: Vec<Vec<LogWriter>> = (0..WRITERS).map(|_| Vec::new()).collect();
    for number in 0..count {
        let build = plant.build().await?;
        writers[number % WRITERS].push(plant.writer(&build).await?);
        builds.push(build);
    }
    let (gateway, nats) = (plant.fleet.process("gateway", 0)?.pid()?, plant.fleet.nats.pid()?);
    let mut clients = plant.clients((count * FOLLOWERS).div_ceil(STREAMS)).await?;
    let mut readers = JoinSet::new();
    let read = Arc::new(AtomicU64::new(0));
    let mut told = Vec::new();
    let mut opened = 0;
    for followers in [1, FOLLOWERS] {
        while opened < count * followers {
            let mut log = follow(&mut clients[opened / STREAMS], &builds[opened % count].id, None).await?;
            let read = read.clone();
            readers.spawn(async move {
                while let Ok(Some(_)) = log.message().await {
                    read.fetch_add(1, Ordering::Relaxed);
                }
            });
            opened += 1;
        }
        // One round unmeasured, so that every follower is past its begin.
        write(&mut writers, Duration::from_secs(1)).await?;
        let (before, read_before) = (processor(nats)?, read.load(Ordering::Relaxed));
        write(&mut writers, lasts).await?;
        let cpu = (processor(nats)? - before) / lasts.as_secs_f64();
        let rate = (read.load(Ordering::Relaxed) - read_before) as f64 / lasts.as_secs_f64();
        told.push((opened, resident(gateway)?, cpu, rate));
    }
    let (few, many) = (told[0], told[1]);
    ensure!(many.3 > few.3, "more followers got fewer messages: {told:?}");
    println!(
        "{} followers of {count} builds at 2 chunks a second ({:.0} messages/s): {:.1} KB of the gateway's memory each (aim: under 20 KB); \
         NATS {:.0} % of a core, with one follower each ({:.0} messages/s) {:.0} % (aim: the same)",
        many.0,
        many.3,
        (many.1.saturating_sub(few.1)) as f64 / 1e3 / (many.0 - few.0) as f64,
        many.2 * 100.0,
        few.3,
        few.2 * 100.0
    );
    Ok(())
}

/// Two chunks a second to each log.
async fn write(writers: &mut [Vec<LogWriter>], lasts: Duration) -> Result<()> {
    let until = Instant::now() + lasts;
    let writing = writers.iter_mut().map(|some| async move {
        let mut tick = tokio::time::interval(Duration::from_millis(500));
        loop {
            tick.tick().await;
            if Instant::now() >= until {
                return anyhow::Ok(());
            }
            for writer in some.iter_mut() {
                append(writer, Bytes::from_static(&[b'x'; 256]), false).await?;
            }
        }
    });
    futures::future::try_join_all(writing).await?;
    Ok(())
}
