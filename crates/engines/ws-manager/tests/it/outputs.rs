//! Outputs whose readers are cut off.

use std::time::Duration;

use anyhow::{Result, ensure};
use kiln_domain::engine::{Cursor, Engine as _};
use kiln_domain::run::RunSecrets;
use kiln_testkit::engine_conformance::{ENDLESS, Job, output};
use kiln_testkit::supervisor::RING;

use crate::place::WsManagerPlace;

/// So much of the output, from its beginning.
async fn read(
    engine: &kiln_engine_ws_manager::WsManagerEngine,
    run: &kiln_domain::id::RunId,
    until: usize,
) -> Result<(Cursor, Vec<u8>)> {
    let (mut cursor, mut text) = (Cursor::default(), Vec::new());
    while text.len() < until {
        let output = engine.read(run, &cursor, 64 * 1024).await?;
        ensure!(!output.end, "it ended");
        cursor = engine.advance(&output.from, &output.bytes);
        text.extend_from_slice(&output.bytes);
    }
    Ok((cursor, text))
}

#[tokio::test(flavor = "multi_thread")]
async fn each_byte_comes_once_whoever_is_cut_off() -> Result<()> {
    let place = WsManagerPlace::new().await?;
    let (engine, spec) = (place.ws_engine(), place.spec(Job::Endless)?);
    engine.start(&spec, &RunSecrets::default()).await?;
    let supervisors = &place.ws_manager.supervisors;
    let id = spec.run.as_str();
    let (_, begun) =
        tokio::time::timeout(Duration::from_secs(30), read(&engine, &spec.run, ENDLESS.len())).await??;
    let mut all = begun;
    let mut at = Cursor::default();
    // In all more than a supervisor keeps, cut off every so often.
    for round in 0..12 {
        let lines: String = (0..4096).map(|line| format!("{round} {line:08}\n")).collect();
        supervisors.write(id, lines.as_bytes());
        all.extend_from_slice(lines.as_bytes());
        if round % 3 == 0 {
            supervisors.cut();
        }
        let (cursor, text) =
            tokio::time::timeout(Duration::from_secs(60), read(&engine, &spec.run, all.len())).await??;
        ensure!(text == all, "after {round} rounds there are {} bytes of {}", text.len(), all.len());
        at = cursor;
    }
    // Another process goes on where this one was.
    supervisors.write(id, b"and the end\n");
    engine.cancel(&spec.run).await?;
    let rest = output(&place.ws_engine(), &spec.run, at, 1024).await?;
    ensure!(rest == b"and the end\n", "{}", String::from_utf8_lossy(&rest));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_supervisor_that_is_first_reached_with_a_full_ring_may_have_said_more() -> Result<()> {
    const MISSING: &str = "kiln: output may be missing before this: ";
    for (written, missing) in [(RING - 4096 - ENDLESS.len(), false), (RING, true)] {
        let place = WsManagerPlace::new().await?;
        let (engine, spec) = (place.ws_engine(), place.spec(Job::Endless)?);
        engine.start(&spec, &RunSecrets::default()).await?;
        let (supervisors, id) = (&place.ws_manager.supervisors, spec.run.as_str());
        // Its work has begun, and said what it says at first.
        while supervisors.output(id).len() < ENDLESS.len() {
            tokio::task::yield_now().await;
        }
        supervisors.write(id, &vec![b'x'; written]);
        let all = supervisors.output(id);
        let kept = &all[all.len().saturating_sub(RING)..];
        let least = kept.len() + if missing { MISSING.len() } else { 0 };
        let reading = read(&engine, &spec.run, least);
        let (_, text) = tokio::time::timeout(Duration::from_secs(60), reading).await??;
        ensure!(text.starts_with(MISSING.as_bytes()) == missing, "{written}");
        ensure!(missing || text == kept, "{written}: {} bytes of {}", text.len(), kept.len());
    }
    Ok(())
}
