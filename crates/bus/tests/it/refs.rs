//! Claims of the resolver's replicas.

use anyhow::{Context as _, Result, ensure};
use jiff::{SignedDuration, Timestamp};
use kiln_bus::refs::{RefKey, RefsBucket};
use kiln_testkit::nats::run_server;

use crate::parts::provisioned;

#[tokio::test]
async fn a_claim_is_one_replicas_until_it_is_released_or_over() -> Result<()> {
    let server = run_server().await?;
    let bucket = RefsBucket::open(&provisioned(&server.url(), 1).await?).await?;
    let key = RefKey([1; 32]);
    let start: Timestamp = "2026-01-01T00:00:00Z".parse()?;
    let at = |seconds| start + SignedDuration::from_secs(seconds);

    let first = bucket.claim(&key, at(0), at(5)).await?.context("nobody has it")?;
    ensure!(bucket.claim(&key, at(4), at(9)).await?.is_none(), "it is another's");
    ensure!(bucket.claim(&RefKey([2; 32]), at(4), at(9)).await?.is_some(), "another key is free");
    bucket.release(first).await?;
    let second = bucket.claim(&key, at(4), at(9)).await?.context("it was released")?;
    let third = bucket.claim(&key, at(10), at(15)).await?.context("it is over")?;
    bucket.release(second).await?;
    ensure!(bucket.claim(&key, at(11), at(15)).await?.is_none(), "who lost it can't release the next one's");
    bucket.release(third).await?;

    let (one, other) = tokio::join!(bucket.claim(&key, at(20), at(25)), bucket.claim(&key, at(20), at(25)));
    ensure!(one?.is_some() != other?.is_some(), "of two at once, one has it");
    Ok(())
}
