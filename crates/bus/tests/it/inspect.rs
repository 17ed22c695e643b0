//! What an examination of the bus finds: nothing, where all is well, and each trouble that is made here by hand.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use async_nats::jetstream::{self, consumer, stream};
use kiln_bus::Lease;
use kiln_bus::holders::{Holders, Member};
use kiln_bus::layout::Layout;
use kiln_bus::serve::Server;
use kiln_contract::subject;
use kiln_domain::finding::{Finding, Verdict};
use kiln_testkit::nats;
use prometheus_client::registry::Registry;
use tokio_util::task::TaskTracker;

use crate::parts::{layout, provisioned};

fn bad(findings: Vec<Finding>) -> Vec<Finding> {
    findings.into_iter().filter(|finding| finding.verdict != Verdict::Ok).collect()
}

/// Exactly one finding isn't good, and it is this one.
fn only(findings: Vec<Finding>, verdict: Verdict, part: &str, says: &str) -> Result<()> {
    let bad = bad(findings);
    let [found] = bad.as_slice() else { anyhow::bail!("{bad:?}") };
    ensure!(found.verdict == verdict && found.part == part && found.says.contains(says), "{found:?}");
    ensure!(found.remedy.is_some());
    Ok(())
}

#[tokio::test]
async fn one_server_and_a_cluster_are_well() -> Result<()> {
    let server = nats::run_server().await?;
    let bus = provisioned(&server.url(), 1).await?;
    let findings = bus.inspect(&layout(1)).await;
    ensure!(bad(findings.clone()).is_empty(), "{findings:?}");
    ensure!(findings.iter().filter(|found| found.part.starts_with("stream ")).count() == 4);
    ensure!(findings.iter().filter(|found| found.part.starts_with("bucket ")).count() == 4);
    only(
        bus.inspect(&Layout { replicas: 3, ..layout(1) }).await.into_iter().take(3).collect(),
        Verdict::Problem,
        "nats replicas",
        "no cluster",
    )?;

    let cluster = nats::run_cluster(3).await?;
    let bus = provisioned(&cluster.url(), 3).await?;
    // A copy of what was made just now may be behind for a moment.
    let until = tokio::time::Instant::now() + Duration::from_secs(60);
    let findings = loop {
        let findings = bus.inspect(&layout(3)).await;
        if bad(findings.clone()).is_empty() {
            break findings;
        }
        ensure!(tokio::time::Instant::now() < until, "{findings:?}");
    };
    ensure!(findings.iter().any(|found| found.says.contains("led by")), "{findings:?}");
    Ok(())
}

#[tokio::test]
async fn streams_that_are_not_as_they_should_be_are_named() -> Result<()> {
    let server = nats::run_server().await?;
    let bus = provisioned(&server.url(), 1).await?;
    let js = jetstream::new(async_nats::connect(server.url()).await?);
    let wanted = layout(1);

    // Somebody has edited one.
    let logs = js.get_stream(subject::LOGS_STREAM).await?.cached_info().config.clone();
    js.update_stream(stream::Config { max_age: Duration::from_secs(60), ..logs }).await?;
    only(bus.inspect(&wanted).await, Verdict::Problem, "stream KILN_LOGS", "max_age is 60 s, not 604800 s")?;
    bus.provision(&wanted).await?;
    ensure!(bad(bus.inspect(&wanted).await).is_empty());

    // Subscribers use consumers up.
    let logs = js.get_stream(subject::LOGS_STREAM).await?;
    for _ in 0..26 {
        logs.create_consumer(consumer::pull::Config::default()).await?;
    }
    only(bus.inspect(&wanted).await, Verdict::Warning, "stream KILN_LOGS", "26 of 32 consumers")?;
    js.delete_stream(subject::LOGS_STREAM).await?;
    only(bus.inspect(&wanted).await, Verdict::Problem, "stream KILN_LOGS", "not there")?;
    bus.provision(&wanted).await?;

    js.delete_key_value(kiln_contract::bucket::REFS).await?;
    only(bus.inspect(&wanted).await, Verdict::Problem, "bucket KILN_REFS", "not there")?;
    bus.provision(&wanted).await?;

    // The journal fills.
    let small = Layout { journal_max_bytes: 1 << 20, ..wanted };
    bus.provision(&small).await?;
    let subject = subject::event(&kiln_testkit::records::queued("x", [0; 10])?.id, "queued");
    for _ in 0..9 {
        js.publish(subject.clone(), vec![0; 100 << 10].into()).await?.await?;
    }
    only(bus.inspect(&small).await, Verdict::Warning, "stream KILN_BUILDS", "% of 1 MiB are used")?;
    js.publish(subject, vec![0; 100 << 10].into()).await?.await?;
    only(bus.inspect(&small).await, Verdict::Problem, "stream KILN_BUILDS", "% of 1 MiB are used")?;
    Ok(())
}

#[tokio::test]
async fn a_follower_that_is_away_is_seen_and_who_lives_is_told() -> Result<()> {
    let mut cluster = nats::run_cluster(3).await?;
    let bus = provisioned(&cluster.url(), 3).await?;
    let tasks = TaskTracker::new();
    let holders = Holders::start(
        &bus,
        Member { role: "orchestrator", host: Some("this-host"), ..Member::default() },
        Lease::default(),
        &tasks,
    )
    .await?;
    let server = Server::start(&bus, "resolver", &mut Registry::default()).await?;
    let instances = bus.instances().await?;
    ensure!(instances.services == ["resolver"], "{instances:?}");
    ensure!(instances.leases.first().context("a lease")?.role() == "orchestrator", "{instances:?}");
    ensure!(instances.hosts.iter().eq(["this-host"]), "{instances:?}");
    server.drain().await;
    holders.release().await;

    let leader = cluster.leader_of(subject::JOURNAL_STREAM).await?;
    let follower = (leader + 1) % 3;
    let other = cluster.nodes.get(leader).context("the leader")?.url();
    cluster.nodes.get_mut(follower).context("a follower")?.kill();
    // Our connection may have been to that one.
    let bus = crate::parts::connect(&other).await?;
    let seen = async {
        loop {
            let findings = bad(bus.inspect(&layout(3)).await);
            let of_journal = findings.iter().find(|found| found.part == "stream KILN_BUILDS");
            if of_journal
                .is_some_and(|found| found.verdict == Verdict::Warning && found.says.contains("its copy on"))
            {
                return;
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(60), seen).await.context("the loss of a follower was not seen")
}
