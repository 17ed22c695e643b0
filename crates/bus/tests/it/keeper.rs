//! The keeper: what somebody deleted is made again, said once, counted, and said to be over.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use async_nats::jetstream;
use kiln_bus::holders::{Holders, Member};
use kiln_bus::journal::{AppendError, Journal};
use kiln_bus::keeper::Keeper;
use kiln_bus::layout::Layout;
use kiln_bus::secrets::SecretsBucket;
use kiln_bus::{Bus, BusError, Lease};
use kiln_contract::{bucket, subject};
use kiln_domain::transition::Change;
use kiln_testkit::nats::{self, NatsServer};
use kiln_testkit::records;
use prometheus_client::registry::Registry;
use tokio::task::JoinSet;
use tokio_util::task::TaskTracker;

use crate::parts::{connect, instance, layout, provisioned};

const SOON: Duration = Duration::from_secs(30);

/// A keeper at work, and what it counts.
pub(crate) struct AtWork {
    registry: Registry,
    /// Ends with this.
    _task: JoinSet<()>,
}

pub(crate) fn keeper(bus: &Bus, layout: &Layout) -> AtWork {
    let mut registry = Registry::with_prefix("kiln_bus");
    let mut task = JoinSet::new();
    task.spawn(Keeper::new(bus, layout, &mut registry).keep());
    AtWork { registry, _task: task }
}

impl AtWork {
    fn text(&self) -> Result<String> {
        let mut text = String::new();
        prometheus_client::encoding::text::encode_registry(&mut text, &self.registry)?;
        Ok(text)
    }

    /// Waits until a line of its metrics is as said.
    pub(crate) async fn shows(&self, line: &str) -> Result<()> {
        let mut text = String::new();
        let look = async {
            loop {
                text = self.text()?;
                if text.lines().any(|shown| shown == line) {
                    return anyhow::Ok(());
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        let shown = tokio::time::timeout(SOON, look).await;
        shown.with_context(|| format!("no `{line}` in\n{text}"))?
    }
}

async fn by_hand(server: &NatsServer) -> Result<jetstream::Context> {
    Ok(jetstream::new(async_nats::connect(server.url()).await?))
}

#[tokio::test]
async fn what_was_deleted_by_hand_is_made_again_and_said_once() -> Result<()> {
    let server = nats::run_server().await?;
    let bus = provisioned(&server.url(), 1).await?;
    let (journal, secrets) = (Journal::open(&bus).await?, SecretsBucket::open(&bus).await?);
    let keeper = keeper(&bus, &layout(1));
    let hand = by_hand(&server).await?;
    let secrets_stream = format!("KV_{}", bucket::SECRETS);
    for stream in [subject::JOURNAL_STREAM, subject::LOGS_STREAM, &secrets_stream] {
        hand.delete_stream(stream).await?;
        keeper.shows(&format!("kiln_bus_troubles_total{{part=\"{stream}\",what=\"missing\"}} 1")).await?;
        keeper.shows(&format!("kiln_bus_trouble{{part=\"{stream}\",what=\"missing\"}} 0")).await?;
    }
    let record = records::queued("x", [1; 10])?;
    secrets.put(&record.id, "sealed".into()).await?;
    let queued = journal.append(None, &Change::Queued(Box::new(record)), &instance(1)?).await?;
    // The mirror of the journal that was deleted would have left out the first events of the new one.
    let mirrored = async {
        loop {
            if let Ok(events) = hand.get_stream(subject::EVENTS_STREAM).await
                && events.get_raw_message(queued.sequence).await.is_ok()
            {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(SOON, mirrored).await.context("the mirror does not follow")?;
    Ok(())
}

#[tokio::test]
async fn a_mirror_that_stands_still_is_shown_and_gets_another_leader() -> Result<()> {
    let cluster = nats::run_cluster(3).await?;
    let bus = connect(&cluster.url()).await?;
    let hand = jetstream::new(async_nats::connect(cluster.url()).await?);
    // One that never takes anything: what nats-server does after a change of leader can't be brought about at will.
    let deaf = jetstream::stream::Config {
        name: subject::EVENTS_STREAM.into(),
        subjects: vec!["deaf".into()],
        num_replicas: 3,
        ..Default::default()
    };
    bus.provision(&layout(3)).await?;
    hand.delete_stream(subject::EVENTS_STREAM).await?;
    hand.create_stream(deaf).await?;
    let first = cluster.leader_of(subject::EVENTS_STREAM).await?;
    let journal = Journal::open(&bus).await?;
    let record = records::queued("x", [1; 10])?;
    journal.append(None, &Change::Queued(Box::new(record)), &instance(1)?).await?;
    let keeper = keeper(&bus, &layout(3));
    keeper.shows("kiln_bus_mirror_lag 1").await?;
    let stands = format!("kiln_bus_trouble{{part=\"{}\",what=\"stands_still\"}} 1", subject::EVENTS_STREAM);
    keeper.shows(&stands).await?;
    let changed = async {
        while cluster.leader_of(subject::EVENTS_STREAM).await.ok().is_none_or(|leader| leader == first) {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(SOON, changed).await.context("its leader stays")
}

#[tokio::test]
async fn what_a_restart_empties_is_made_again_and_is_no_trouble() -> Result<()> {
    let mut server = nats::run_server().await?;
    let bus = provisioned(&server.url(), 1).await?;
    let keeper = keeper(&bus, &layout(1));
    let steps =
        |count| format!("kiln_bus_stream_subjects{{stream=\"{}\"}} {count}", subject::PROGRESS_STREAM);
    keeper.shows(&steps(0)).await?;
    server.kill();
    server.start_again().await?;
    let there = async {
        loop {
            if let Ok(hand) = by_hand(&server).await
                && hand.get_stream(subject::PROGRESS_STREAM).await.is_ok()
            {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(SOON, there).await.context("it is not made again")?;
    // What the keeper makes of it is told before it looks at it next.
    let told = subject::progress(&records::queued("x", [1; 10])?.id);
    by_hand(&server).await?.publish(told, "".into()).await?.await?;
    keeper.shows(&steps(1)).await?;
    let told = keeper.text()?;
    ensure!(!told.contains("what=\"missing\""), "{told}");
    Ok(())
}

#[tokio::test]
async fn what_streams_hold_and_may_hold_is_shown() -> Result<()> {
    let server = nats::run_server().await?;
    let bus = connect(&server.url()).await?;
    let chosen = Layout { logs_max_bytes: 5 << 20, logs_max_age: Duration::from_secs(7_200), ..layout(1) };
    bus.provision(&chosen).await?;
    let logs = kiln_bus::logs::Logs::new(&bus);
    for n in 1..=3 {
        let id = records::queued("x", [n; 10])?.id;
        logs.claim(&id, &instance(1)?, None).await?;
    }
    let keeper = keeper(&bus, &chosen);
    for (name, value) in [("limit_bytes", 5 << 20), ("max_age_seconds", 7_200), ("subjects", 3)] {
        keeper
            .shows(&format!("kiln_bus_stream_{name}{{stream=\"{}\"}} {value}", subject::LOGS_STREAM))
            .await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_full_journal_is_shown_and_names_itself() -> Result<()> {
    let server = nats::run_server().await?;
    let bus = connect(&server.url()).await?;
    let small = Layout { journal_max_bytes: 64 << 10, ..layout(1) };
    bus.provision(&small).await?;
    let keeper = keeper(&bus, &small);
    let journal = Journal::open(&bus).await?;
    let full = async {
        for n in 0u8.. {
            let record = records::queued(&format!("i{n}"), [n; 10])?;
            match journal.append(None, &Change::Queued(Box::new(record)), &instance(1)?).await {
                Ok(_) => {}
                Err(AppendError::Bus(BusError::Full { detail, .. })) => return Ok(detail),
                Err(other) => anyhow::bail!("{other:?}"),
            }
        }
        anyhow::bail!("it is never full")
    };
    let says = full.await?;
    ensure!(says.contains(subject::JOURNAL_STREAM), "{says}");
    keeper
        .shows(&format!("kiln_bus_trouble{{part=\"{}\",what=\"full\"}} 1", subject::JOURNAL_STREAM))
        .await?;
    let larger = Layout { journal_max_bytes: 1 << 20, ..layout(1) };
    bus.provision(&larger).await?;
    keeper
        .shows(&format!("kiln_bus_trouble{{part=\"{}\",what=\"full\"}} 0", subject::JOURNAL_STREAM))
        .await?;
    // This process's own settings still say otherwise.
    keeper
        .shows(&format!("kiln_bus_trouble{{part=\"{}\",what=\"different\"}} 1", subject::JOURNAL_STREAM))
        .await
}

/// Long before its last byte is used: what is left may be needed for the ends of the builds that it holds.
#[tokio::test]
async fn a_journal_that_takes_no_further_build_is_shown_as_full() -> Result<()> {
    let server = nats::run_server().await?;
    let bus = connect(&server.url()).await?;
    let small = Layout { journal_max_bytes: 32 << 20, ..layout(1) };
    bus.provision(&small).await?;
    let keeper = keeper(&bus, &small);
    let journal = Journal::open(&bus).await?;
    let labels = format!("part=\"{}\",what=\"full\"", subject::JOURNAL_STREAM);
    ensure!(kiln_bus::journal::room_for(32 << 20) == 3);
    ensure!(journal.refuses(2).await?.is_none());
    let why = journal.refuses(3).await?.context("a fourth would not have room for its end")?;
    ensure!(why.contains(subject::JOURNAL_STREAM) && why.contains("streams.journal_max_bytes"), "{why}");
    journal.tell_room(3).await;
    keeper.shows(&format!("kiln_bus_trouble{{{labels}}} 1")).await?;
    journal.tell_room(1).await;
    keeper.shows(&format!("kiln_bus_trouble{{{labels}}} 0")).await
}

#[tokio::test]
async fn a_bus_that_is_away_is_shown_and_over_when_it_is_back() -> Result<()> {
    let mut server = nats::run_server().await?;
    let bus = provisioned(&server.url(), 1).await?;
    let keeper = keeper(&bus, &layout(1));
    keeper.shows(&format!("kiln_bus_stream_bytes{{stream=\"{}\"}} 0", subject::JOURNAL_STREAM)).await?;
    server.kill();
    keeper.shows("kiln_bus_trouble{part=\"bus\",what=\"unreachable\"} 1").await?;
    server.start_again().await?;
    keeper.shows("kiln_bus_trouble{part=\"bus\",what=\"unreachable\"} 0").await
}

#[tokio::test]
async fn a_lease_stands_though_its_bucket_was_purged_or_deleted() -> Result<()> {
    let server = nats::run_server().await?;
    let bus = provisioned(&server.url(), 1).await?;
    let keeper = keeper(&bus, &layout(1));
    let tasks = TaskTracker::new();
    let holders =
        Holders::start(&bus, Member { role: "orchestrator", ..Member::default() }, Lease::default(), &tasks)
            .await?;
    let me = holders.me().context("a lease")?;
    let hand = by_hand(&server).await?;
    let stream = format!("KV_{}", bucket::HOLDERS);
    // So that a bucket made anew begins far below where the old one was.
    for n in 0..500 {
        let filler = format!("$KV.{}.filler-{n}", bucket::HOLDERS);
        hand.publish(filler, "x".into()).await?.await?;
    }
    let purge = async || anyhow::Ok(hand.get_stream(&stream).await?.purge().await.map(|_| ())?);
    let delete = async || anyhow::Ok(hand.delete_stream(&stream).await.map(|_| ())?);
    purge().await?;
    written_again(&bus, &holders).await.context("after the purge")?;
    keeper.shows(&format!("kiln_bus_troubles_total{{part=\"{stream}\",what=\"emptied\"}} 1")).await?;
    keeper.shows(&format!("kiln_bus_trouble{{part=\"{stream}\",what=\"emptied\"}} 0")).await?;
    delete().await?;
    written_again(&bus, &holders).await.context("after the deletion")?;
    ensure!(holders.me() == Some(me), "it goes on as who it was, with its claims");
    // The watch goes on with the bucket that is there now.
    let second =
        Holders::start(&bus, Member { role: "orchestrator", ..Member::default() }, Lease::default(), &tasks)
            .await?;
    let second = second.me().context("a lease")?;
    let mut changes = holders.changes();
    let seen = changes.wait_for(|live| live.contains(&second));
    tokio::time::timeout(SOON, seen).await.context("the second is not seen")??;
    Ok(())
}

/// Waits until the lease is in the bucket.
async fn written_again(bus: &Bus, holders: &Holders) -> Result<()> {
    let me = holders.me().context("a lease")?;
    let look = async {
        loop {
            if bus.instances().await.is_ok_and(|instances| instances.leases.contains(&me)) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    Ok(tokio::time::timeout(SOON, look).await?)
}

#[tokio::test]
async fn a_bus_that_takes_nothing_is_told_while_it_lasts_whatever_else_is_wrong() -> Result<()> {
    let server = nats::run_server().await?;
    let bus = provisioned(&server.url(), 1).await?;
    // Something that is wrong for good.
    let other = Layout { logs_max_bytes: 512 << 20, ..layout(1) };
    let mut registry = Registry::with_prefix("kiln_bus");
    let keeper = Keeper::new(&bus, &other, &mut registry);
    let takes = keeper.takes();
    let mut task = JoinSet::new();
    task.spawn(keeper.keep());
    let at_work = AtWork { registry, _task: task };
    takes.check("try")?;
    let holders = format!("KV_{}", kiln_contract::bucket::HOLDERS);
    server.take_in_silence(&holders, true).await?;
    at_work.shows("kiln_bus_trouble{part=\"bus\",what=\"takes_nothing\"} 1").await?;
    at_work.shows("kiln_bus_trouble{part=\"KILN_LOGS\",what=\"different\"} 1").await?;
    let refused = takes.check("try").err().context("it is let through")?.to_string();
    ensure!(refused.contains("takes no write") && refused.contains("make room"), "{refused}");
    server.take_in_silence(&holders, false).await?;
    at_work.shows("kiln_bus_trouble{part=\"bus\",what=\"takes_nothing\"} 0").await?;
    takes.check("try")?;
    Ok(())
}
