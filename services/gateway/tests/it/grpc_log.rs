//! A log through gRPC, whose flow control is what slows a client that reads slowly, and nobody else.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use kiln_bus::logs::CHUNK_BYTES;
use kiln_proto::kiln_v1::{BuildLogsRequest, LogChunk};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tonic::Streaming;

use crate::bed::{Bed, LONG};

/// Of each kind.
const READERS: usize = 50;
const CONNECTIONS: usize = 5;
/// Bytes a second of a slow reader.
const CRAWL: f64 = 10_000.0;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_that_crawl_slow_nobody_and_take_no_memory() -> Result<()> {
    #[expect(clippy::disallowed_methods, reason = "how a person asks for a longer run of this test")]
    let mib: usize = std::env::var("TEST_LOG_MIB").map_or(Ok(8), |mib| mib.parse())?;
    let bed = Bed::new().await?;
    let mut play = bed.build(1).await?;
    let output: Arc<Vec<u8>> = Arc::new((0..mib << 20).map(|at| (at * 31 % 251) as u8).collect());
    let (at_once, hurry) = (CancellationToken::new(), CancellationToken::new());
    at_once.cancel();
    let (mut running, mut crawling) = (JoinSet::new(), JoinSet::new());
    for (readers, hurry) in [(&mut running, &at_once), (&mut crawling, &hurry)] {
        for _ in 0..CONNECTIONS {
            let mut client = bed.client().await?;
            for _ in 0..READERS / CONNECTIONS {
                let request = BuildLogsRequest { id: play.id.to_string(), follow: true, start: None };
                let log = client.build_logs(request).await?.into_inner();
                readers.spawn(compare(log, output.clone(), hurry.clone()));
            }
        }
    }
    bed.until_readers(2 * READERS as u64).await?;
    let before = resident()?;
    for chunk in output.chunks(CHUNK_BYTES) {
        play.write(chunk.to_vec()).await?;
    }
    play.end().await?;
    while let Some(read) = running.join_next().await {
        read??;
    }
    // Those who ran are at the end, and of those who crawl nobody is: each holds what its connection lets through.
    ensure!(crawling.try_join_next().is_none(), "a reader that crawls was as fast as those who run");
    let more = resident()?.saturating_sub(before);
    ensure!(more < 150 << 20, "{} MiB more for {READERS} readers that crawl", more >> 20);
    hurry.cancel();
    while let Some(read) = crawling.join_next().await {
        read??;
    }
    bed.end().await
}

/// Reads a log and compares it with what it should be. Until it is to `hurry`, it takes [`CRAWL`] bytes a second.
async fn compare(
    mut log: Streaming<LogChunk>,
    expected: Arc<Vec<u8>>,
    hurry: CancellationToken,
) -> Result<()> {
    let (mut end, mut complete) = (0, false);
    while let Some(chunk) = timeout(LONG, log.message()).await.context("the log stands still")?? {
        ensure!(chunk.offset == end as u64, "a gap or a repeat: {} after {end}", chunk.offset);
        let length = chunk.content.len();
        ensure!(expected.get(end..end + length) == Some(&chunk.content[..]), "another byte after {end}");
        (end, complete) = (end + length, chunk.complete);
        let rest = Duration::from_secs_f64(length as f64 / CRAWL);
        hurry.run_until_cancelled(tokio::time::sleep(rest)).await;
    }
    ensure!(complete && end == expected.len(), "{end} bytes of {}", expected.len());
    Ok(())
}

/// The memory of the test's process, which is also the gateway's and the clients', in bytes.
fn resident() -> Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    let kib: u64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kib * 1024)
}
