//! What logs cost: gateway, log-relay and NATS as processes of their own, each figure beside what the same takes without
//! Kiln, in the same run. Prints, and asserts only that every byte came.
//!
//! Names of parts (`just bench-logs fan-out delay`) run those alone. `BENCH_SCALE=0.1` makes everything smaller, for a quick look.

#![expect(
    clippy::print_stdout,
    clippy::disallowed_methods,
    clippy::indexing_slicing,
    reason = "a benchmark measures time, prints figures, and may end where a test may"
)]

mod bare;
mod delay;
mod fan_out;
mod ingest;
mod many;
mod plant;
mod replay;

use anyhow::Result;

use crate::plant::Plant;

/// The share of the full size that this run has.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scale(f64);

impl Scale {
    /// That share of `full`, and no less than `least`.
    fn of(self, full: usize, least: usize) -> usize {
        ((full as f64 * self.0) as usize).max(least)
    }
}

fn main() -> Result<()> {
    let runtime = tokio::runtime::Runtime::new()?;
    let arguments: Vec<String> = std::env::args().collect();
    // This program is also the bare server, which must be a process of its own as the gateway is.
    if let Some(at) = arguments.iter().position(|argument| argument == bare::ARGUMENT) {
        return runtime.block_on(bare::serve(&arguments[at + 1..]));
    }
    let named: Vec<_> = arguments.iter().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    let wanted = |part: &str| named.is_empty() || named.iter().any(|name| *name == part);
    let scale = Scale(std::env::var("BENCH_SCALE").map_or(Ok(1.0), |scale| scale.parse())?);
    runtime.block_on(async {
        let mut plant = Plant::start().await?;
        if wanted("ingest") {
            ingest::run(&mut plant, scale).await?;
        }
        if wanted("delay") {
            delay::run(&mut plant, scale).await?;
        }
        if wanted("fan-out") {
            fan_out::run(&mut plant, scale).await?;
        }
        if wanted("many") {
            many::run(&mut plant, scale).await?;
        }
        if wanted("replay") {
            replay::run(&mut plant, scale).await?;
        }
        Ok(())
    })
}

/// The value below which that part of the sorted values lies.
pub(crate) fn quantile<T: Copy>(sorted: &[T], part: f64) -> T {
    sorted[((sorted.len() - 1) as f64 * part).round() as usize]
}
