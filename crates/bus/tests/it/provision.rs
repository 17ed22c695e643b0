//! Streams and buckets are made by one place: by several processes at once without harm, and what can't be is said.

use anyhow::{Context as _, Result, ensure};
use async_nats::jetstream;
use kiln_bus::Bus;
use kiln_bus::layout::Layout;
use kiln_contract::{bucket, subject};
use kiln_domain::finding::Verdict;
use kiln_testkit::nats;

use crate::parts::{connect, layout, provisioned};

#[tokio::test(flavor = "multi_thread")]
async fn eight_processes_make_them_at_once_and_change_them_at_once() -> Result<()> {
    let server = nats::run_server().await?;
    let url = server.url();
    let buses = futures::future::try_join_all((0..8).map(|_| provisioned(&url, 1))).await?;
    let larger = Layout { journal_max_bytes: 512 << 20, ..layout(1) };
    futures::future::try_join_all(buses.iter().map(|bus| bus.provision(&larger))).await?;
    let bus = buses.first().context("a bus")?;
    let wrong: Vec<_> = bus
        .inspect(&larger)
        .await
        .into_iter()
        .filter(|finding| finding.verdict == Verdict::Problem)
        .collect();
    ensure!(wrong.is_empty(), "{wrong:?}");
    Ok(())
}

/// What provisioning says where it can't be done.
async fn refused(bus: &Bus, layout: &Layout) -> Result<String> {
    Ok(bus.provision(layout).await.err().context("it was done")?.to_string())
}

#[tokio::test]
async fn a_change_that_cannot_be_made_says_what_and_why() -> Result<()> {
    let server = nats::run_server().await?;
    let bus = connect(&server.url()).await?;
    let js = jetstream::new(async_nats::connect(server.url()).await?);
    let says = refused(&bus, &layout(3)).await?;
    ensure!(says.contains(subject::JOURNAL_STREAM) && says.contains("replicas > 1"), "{says}");
    js.create_stream(jetstream::stream::Config {
        name: subject::JOURNAL_STREAM.into(),
        subjects: vec![subject::JOURNAL_SUBJECTS.into()],
        storage: jetstream::stream::StorageType::Memory,
        ..Default::default()
    })
    .await?;
    let says = refused(&bus, &layout(1)).await?;
    ensure!(says.contains(subject::JOURNAL_STREAM) && says.contains("storage type"), "{says}");
    js.delete_stream(subject::JOURNAL_STREAM).await?;
    js.create_key_value(jetstream::kv::Config {
        bucket: bucket::SECRETS.into(),
        storage: jetstream::stream::StorageType::Memory,
        ..Default::default()
    })
    .await?;
    let says = refused(&bus, &layout(1)).await?;
    ensure!(says.contains(bucket::SECRETS) && says.contains("storage type"), "{says}");
    Ok(())
}

#[tokio::test]
async fn who_has_no_room_is_told_what_is_reserved_and_by_which_setting() -> Result<()> {
    let server = nats::run_small_server(1 << 30).await?;
    let bus = connect(&server.url()).await?;
    // Journal and mirror fit, the logs don't.
    let large = Layout { logs_max_bytes: 2 << 30, ..layout(1) };
    let says = refused(&bus, &large).await?;
    for expected in [subject::LOGS_STREAM, "2 GiB (`streams.logs_max_bytes`) of 2.7 GiB", "`max_file_store`"]
    {
        ensure!(says.contains(expected), "{expected}: {says}");
    }
    let findings = bus.inspect(&large).await;
    let room = findings.iter().find(|found| found.part == "nats jetstream").context("not looked at")?;
    ensure!(room.verdict == Verdict::Problem, "{room:?}");
    for expected in ["no room for the 2.2 GiB", "2.7 GiB in all", "insufficient storage"] {
        ensure!(room.says.contains(expected), "{expected}: {room:?}");
    }

    // A change that has no room is told the same.
    bus.provision(&layout(1)).await?;
    let says = refused(&bus, &Layout { journal_max_bytes: 2 << 30, ..layout(1) }).await?;
    ensure!(says.contains("2 GiB (`streams.journal_max_bytes`)"), "{says}");
    // What it was asked for is gone.
    let names: Vec<String> = futures::TryStreamExt::try_collect(
        jetstream::new(async_nats::connect(server.url()).await?).stream_names(),
    )
    .await?;
    ensure!(names.len() == 8, "{names:?}");
    Ok(())
}
