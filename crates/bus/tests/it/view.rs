//! The view: the last record of every build, in order, also after a cut.

use std::time::Duration;

use anyhow::{Result, ensure};
use kiln_bus::journal::Journal;
use kiln_bus::view::View;
use kiln_domain::run::Findings;
use kiln_domain::transition::Change;
use kiln_testkit::{nats, records, wire::Wire};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::parts::{connect, instance, provisioned};

const SOON: Duration = Duration::from_secs(20);

#[tokio::test]
async fn it_holds_what_was_there_and_what_comes() -> Result<()> {
    let server = nats::run_server().await?;
    let bus = provisioned(&server.url(), 1).await?;
    let journal = Journal::open(&bus).await?;
    let by = instance(1)?;
    let mut queued = Vec::new();
    for n in 0..5u8 {
        let change = Change::Queued(Box::new(records::queued(&format!("i{n}"), [n; 10])?));
        queued.push(journal.append(None, &change, &by).await?);
    }
    let view = View::start(&bus, 100, &TaskTracker::new(), &CancellationToken::new());
    tokio::time::timeout(SOON, view.caught_up()).await?;
    ensure!(view.active().len() == 5);
    let over = Change::Cancelled { by: None, findings: Findings::default() };
    let over = journal.append(Some(&queued[1]), &over, &by).await?;
    ensure!(view.reached(over.sequence, SOON).await);
    ensure!(view.get(&over.record.id).as_deref() == Some(&over), "it is what the append answered");
    ensure!(view.active().iter().all(|entry| entry.record.id != over.record.id));
    let newest: Vec<_> =
        view.newest(None, |_| true, 3).into_iter().map(|(_, entry)| entry.record.id.clone()).collect();
    let expected: Vec<_> = queued.iter().rev().take(3).map(|entry| entry.record.id.clone()).collect();
    ensure!(newest == expected, "a change moves no build in the list");
    Ok(())
}

#[tokio::test]
async fn an_empty_journal_is_caught_up_with() -> Result<()> {
    let server = nats::run_server().await?;
    let bus = provisioned(&server.url(), 1).await?;
    let view = View::start(&bus, 100, &TaskTracker::new(), &CancellationToken::new());
    tokio::time::timeout(SOON, view.caught_up()).await?;
    ensure!(view.active().is_empty());
    Ok(())
}

#[tokio::test]
async fn a_cut_loses_nothing() -> Result<()> {
    let server = nats::run_server().await?;
    let bus = provisioned(&server.url(), 1).await?;
    let journal = Journal::open(&bus).await?;
    let wire = Wire::to(&server.address()).await?;
    let far = connect(&format!("nats://{}", wire.address())).await?;
    let view = View::start(&far, 100, &TaskTracker::new(), &CancellationToken::new());
    tokio::time::timeout(SOON, view.caught_up()).await?;
    wire.cut();
    let mut last = 0;
    for n in 0..20u8 {
        let change = Change::Queued(Box::new(records::queued(&format!("i{n}"), [n; 10])?));
        last = journal.append(None, &change, &instance(1)?).await?.sequence;
    }
    wire.restore();
    ensure!(view.reached(last, Duration::from_secs(60)).await);
    ensure!(view.active().len() == 20);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn many_processes_make_the_streams_at_once() -> Result<()> {
    let server = nats::run_server().await?;
    let url = server.url();
    let made = (0..12).map(|_| provisioned(&url, 1));
    ensure!(futures::future::try_join_all(made).await?.len() == 12);
    Ok(())
}
