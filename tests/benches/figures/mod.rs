//! How benchmarks show what they measured.

#![expect(clippy::indexing_slicing, reason = "a benchmark may end where a test may")]

use std::time::Duration;

/// Median, 90th and 99th percentile, and the greatest of some times.
pub(crate) fn figures(times: &mut [Duration]) -> String {
    times.sort();
    let at = |part: f64| times[((times.len() - 1) as f64 * part).round() as usize];
    format!(
        "p50 {:.1?} p90 {:.1?} p99 {:.1?} max {:.1?} of {}",
        at(0.5),
        at(0.9),
        at(0.99),
        at(1.0),
        times.len()
    )
}
