//! Appends: one winner whatever the race, and a lost answer is decided by reading back.

use std::time::Duration;

use anyhow::{Result, ensure};
use kiln_bus::Bus;
use kiln_bus::journal::{AppendError, Journal};
use kiln_contract::subject;
use kiln_domain::failure::{Failure, FailureReason};
use kiln_domain::record::State;
use kiln_domain::run::Findings;
use kiln_domain::transition::Change;
use kiln_testkit::{nats, records, wire::Wire};

use crate::parts::{connect, instance, provisioned};

#[tokio::test]
async fn one_of_fifty_racers_wins_on_one_node() -> Result<()> {
    let server = nats::run_server().await?;
    race(&provisioned(&server.url(), 1).await?).await
}

#[tokio::test(flavor = "multi_thread")]
async fn one_of_fifty_racers_wins_on_three_nodes() -> Result<()> {
    let cluster = nats::run_cluster(3).await?;
    race(&provisioned(&cluster.url(), 3).await?).await
}

/// Rounds of racers that all want to claim the same build, each on the tail that it read.
async fn race(bus: &Bus) -> Result<()> {
    let journal = Journal::open(bus).await?;
    for round in 0..5u8 {
        let record = records::queued(&format!("race-{round}"), [round; 10])?;
        let queued = journal.append(None, &Change::Queued(Box::new(record)), &instance(0)?).await?;
        let mut racers = tokio::task::JoinSet::new();
        for n in 1..=50 {
            let (journal, queued, by) = (journal.clone(), queued.clone(), instance(n)?);
            racers.spawn(async move {
                journal.append(Some(&queued), &Change::Claimed { by: by.clone() }, &by).await
            });
        }
        let (mut winners, mut losers) = (Vec::new(), 0);
        while let Some(raced) = racers.join_next().await {
            match raced? {
                Ok(entry) => winners.push(entry),
                Err(AppendError::Lost) => losers += 1,
                Err(other) => return Err(other.into()),
            }
        }
        ensure!(winners.len() == 1 && losers == 49, "{} won, {losers} lost", winners.len());
        let last = journal.last_of_build(&queued.record.id).await?;
        ensure!(last.as_ref() == winners.first(), "the journal says {last:?}");
    }
    Ok(())
}

#[tokio::test]
async fn two_builds_of_one_image_do_not_both_begin() -> Result<()> {
    let server = nats::run_server().await?;
    let journal = Journal::open(&provisioned(&server.url(), 1).await?).await?;
    let first = Change::Queued(Box::new(records::queued("x", [1; 10])?));
    let second = Change::Queued(Box::new(records::queued("x", [2; 10])?));
    let by = instance(0)?;
    let (first, second) = tokio::join!(journal.append(None, &first, &by), journal.append(None, &second, &by));
    let (begun, lost) = if first.is_ok() { (first, second) } else { (second, first) };
    ensure!(matches!(lost, Err(AppendError::Lost)), "{lost:?}");
    // Once it is over, the image may be built again, on the tail of the build before.
    let begun = begun?;
    let over = Change::Cancelled { by: None, findings: Findings::default() };
    let over = journal.append(Some(&begun), &over, &by).await?;
    ensure!(over.record.state == State::Cancelled && over.record.finished_at == Some(over.stored_at));
    ensure!(over.record.queued_at == Some(begun.stored_at));
    let third = Change::Queued(Box::new(records::queued("x", [3; 10])?));
    ensure!(matches!(journal.append(None, &third, &by).await, Err(AppendError::Lost)));
    journal.append(Some(&over), &third, &by).await?;
    Ok(())
}

#[tokio::test]
async fn an_append_whose_answer_was_lost_is_found_to_have_happened() -> Result<()> {
    let server = nats::run_server().await?;
    let direct = Journal::open(&provisioned(&server.url(), 1).await?).await?;
    let wire = Wire::to(&server.address()).await?;
    let journal = Journal::open(&connect(&format!("nats://{}", wire.address())).await?).await?;
    let change = Change::Queued(Box::new(records::queued("x", [1; 10])?));
    wire.lose_answers();
    let by = instance(1)?;
    let appending = journal.append(None, &change, &by);
    let key = records::queued("x", [1; 10])?.image_key();
    let arrived = async {
        loop {
            if let Some(entry) = direct.last_of_image(&key).await? {
                return Ok::<_, kiln_bus::BusError>(entry);
            }
            tokio::task::yield_now().await;
        }
    };
    let seen = async {
        let arrived = tokio::time::timeout(Duration::from_secs(20), arrived).await??;
        wire.restore();
        Ok::<_, anyhow::Error>(arrived)
    };
    let (appended, arrived) = tokio::join!(appending, seen);
    let (appended, arrived) = (appended?, arrived?);
    ensure!(appended == arrived, "the append says {appended:?}");
    ensure!(direct.last_of_image(&key).await? == Some(arrived), "it was appended once");
    Ok(())
}

#[tokio::test]
async fn an_illegal_change_is_not_sent() -> Result<()> {
    let server = nats::run_server().await?;
    let journal = Journal::open(&provisioned(&server.url(), 1).await?).await?;
    let queued = Change::Queued(Box::new(records::queued("x", [1; 10])?));
    let queued = journal.append(None, &queued, &instance(1)?).await?;
    let failure = Failure::new(FailureReason::Internal, "no");
    let change = Change::Failed { by: Some(instance(1)?), failure, findings: Findings::default() };
    let refused = journal.append(Some(&queued), &change, &instance(1)?).await;
    ensure!(matches!(refused, Err(AppendError::Illegal(_))), "{refused:?}");
    ensure!(journal.last_of_build(&queued.record.id).await? == Some(queued));
    Ok(())
}

#[tokio::test]
async fn events_are_cloudevents_and_others_read_them_from_the_mirror() -> Result<()> {
    let server = nats::run_server().await?;
    let bus = provisioned(&server.url(), 1).await?;
    let journal = Journal::open(&bus).await?;
    let record = records::queued("x", [1; 10])?;
    journal.append(None, &Change::Queued(Box::new(record.clone())), &instance(7)?).await?;
    let client = async_nats::connect(server.url()).await?;
    let mirror = async_nats::jetstream::new(client).get_stream(subject::EVENTS_STREAM).await?;
    let read = async {
        loop {
            if let Ok(message) = mirror.get_raw_message(1).await {
                return message;
            }
            tokio::task::yield_now().await;
        }
    };
    let message = tokio::time::timeout(Duration::from_secs(20), read).await?;
    let header = |name: &str| message.headers.get(name).map(ToString::to_string).unwrap_or_default();
    ensure!(header("ce-specversion") == "1.0");
    ensure!(header("ce-type") == "dev.kiln.build.queued.v1");
    ensure!(header("ce-subject") == record.id.as_str());
    ensure!(header("ce-source") == "/kiln/orchestrator-0000000000000007");
    ensure!(header("content-type") == "application/json");
    ensure!(!header("ce-id").is_empty() && header("ce-id") == header("Nats-Msg-Id"));
    ensure!(serde_json::from_slice::<serde_json::Value>(&message.payload)?["id"] == record.id.as_str());
    Ok(())
}

#[tokio::test]
async fn a_full_journal_says_so() -> Result<()> {
    let server = nats::run_server().await?;
    let bus = connect(&server.url()).await?;
    let layout =
        kiln_bus::layout::Layout { journal_max_bytes: 4096, logs_max_bytes: 1 << 20, ..Default::default() };
    bus.provision(&layout).await?;
    let journal = Journal::open(&bus).await?;
    for n in 0..100u8 {
        let change = Change::Queued(Box::new(records::queued(&format!("x{n}"), [n; 10])?));
        match journal.append(None, &change, &instance(1)?).await {
            Ok(_) => {}
            Err(AppendError::Bus(kiln_bus::BusError::Full { .. })) => return Ok(()),
            Err(other) => anyhow::bail!("{other:?}"),
        }
    }
    anyhow::bail!("4 KiB took a hundred records")
}
