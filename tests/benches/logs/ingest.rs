//! One builder at full speed: from the first byte that it writes to the last that is stored.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use bytes::Bytes;
use kiln_bus::logs::CHUNK_BYTES;
use kiln_testkit::bare;

use crate::Scale;
use crate::plant::Plant;

const ROUNDS: usize = 3;

pub(crate) async fn run(plant: &mut Plant, scale: Scale) -> Result<()> {
    let line = format!("{} of a build's output, as compilers write it\n", "x".repeat(60));
    let length = scale.of(48 << 20, 2 << 20);
    let output = Bytes::from(line.repeat(length / line.len()));
    let chunks: Vec<Bytes> = (0..output.len())
        .step_by(CHUNK_BYTES)
        .map(|at| output.slice(at..output.len().min(at + CHUNK_BYTES)))
        .collect();
    let rate = |took: Duration| output.len() as f64 / 1e6 / took.as_secs_f64();
    let mut chunk = 0;
    let (mut ratios, mut kiln, mut alone) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let mut build = plant.build().await?;
        let mut builder = plant.builder(&mut build).await?;
        // The relay has the log before the clock runs.
        while plant.logs.tail(&build.id).await?.is_none() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let begun = Instant::now();
        builder.write(&output)?;
        while plant.logs.tail(&build.id).await?.is_none_or(|tail| tail.end < output.len() as u64) {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        kiln.push(rate(begun.elapsed()));
        let info = plant.logs.info(&build.id).await?.context("no log")?;
        chunk = output.len() as u64 / info.chunks;
        plant.end(&build, builder).await?;
        let url = plant.fleet.nats.url();
        alone.push(rate(bare::publish(&url, kiln_contract::subject::LOGS_STREAM, &chunks).await?));
        ratios.push(kiln[kiln.len() - 1] / alone[alone.len() - 1]);
    }
    for figures in [&mut ratios, &mut kiln, &mut alone] {
        figures.sort_by(f64::total_cmp);
    }
    println!(
        "ingest, one builder, {} MB: {:.0} MB/s in chunks of {chunk} bytes; a bare JetStream publisher {:.0} MB/s; ratio p50 {:.2}, from {:.2} to {:.2} (aim: at least 0.7)",
        output.len() / 1_000_000,
        kiln[ROUNDS / 2],
        alone[ROUNDS / 2],
        ratios[ROUNDS / 2],
        ratios[0],
        ratios[ROUNDS - 1]
    );
    Ok(())
}
