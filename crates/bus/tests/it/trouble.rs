//! A bus that is away, full, emptied or without its majority: every call ends soon, and all goes on by itself.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use async_nats::jetstream;
use bytes::Bytes;
use futures::{Stream, StreamExt as _, TryStreamExt as _};
use kiln_bus::journal::{AppendError, Entry, Journal};
use kiln_bus::logs::{self as log, Chunk, LogError, Logs, Source, Start, Until};
use kiln_bus::secrets::SecretsBucket;
use kiln_bus::view::{News, View};
use kiln_bus::{Bus, BusError};
use kiln_contract::error::{Code, Refusal};
use kiln_contract::resolver::ResolveImage;
use kiln_contract::subject;
use kiln_domain::transition::Change;
use kiln_testkit::{nats, records};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::keeper::keeper;
use crate::parts::{instance, layout, provisioned};

const SOON: Duration = Duration::from_secs(20);

/// JetStream as somebody's hand reaches it.
async fn by_hand(server: &nats::NatsServer) -> Result<jetstream::Context> {
    Ok(jetstream::new(async_nats::connect(server.url()).await?))
}

async fn queue(journal: &Journal, n: u8) -> Result<Entry> {
    let change = Change::Queued(Box::new(records::queued(&format!("i{n}"), [n; 10])?));
    Ok(journal.append(None, &change, &instance(1)?).await?)
}

/// Every call of the bus once: the error of each, by its name.
async fn every_call(
    bus: &Bus,
    journal: &Journal,
    secrets: &SecretsBucket,
) -> Result<Vec<(&'static str, Option<Code>)>> {
    let record = records::queued("away", [99; 10])?;
    let (id, key) = (record.id.clone(), record.image_key());
    let code = |error: BusError| Refusal::from(error).code;
    let logs = Logs::new(bus);
    let asked = bus.ask(&ResolveImage::default(), Duration::from_secs(30)).await;
    let appended = match journal.append(None, &Change::Queued(Box::new(record)), &instance(1)?).await {
        Err(AppendError::Bus(error)) => Some(code(error)),
        _ => None,
    };
    Ok(vec![
        ("ask", asked.err().map(|refusal| refusal.code)),
        ("append", appended),
        ("read the journal", journal.last_of_image(&key).await.err().map(code)),
        ("room", journal.refuses(0).await.err().map(code)),
        ("tail of a log", logs.tail(&id).await.err().map(code)),
        ("keep secrets", secrets.put(&id, "x".into()).await.err().map(code)),
        ("read secrets", secrets.get(&id).await.err().map(code)),
        ("list secrets", secrets.builds().await.err().map(code)),
        ("remove secrets", secrets.remove(&id).await.err().map(code)),
    ])
}

#[tokio::test]
async fn without_the_server_every_call_is_unavailable_at_once_and_with_it_all_goes_on() -> Result<()> {
    let mut server = nats::run_server().await?;
    let bus = provisioned(&server.url(), 1).await?;
    let (journal, secrets) = (Journal::open(&bus).await?, SecretsBucket::open(&bus).await?);
    let view = View::start(&bus, 100, &TaskTracker::new(), &CancellationToken::new());
    queue(&journal, 1).await?;
    server.kill();
    let begun = Instant::now();
    let calls = every_call(&bus, &journal, &secrets).await?;
    let took = begun.elapsed();
    for (call, code) in &calls {
        ensure!(*code == Some(Code::Unavailable), "{call}: {code:?}");
    }
    ensure!(took < Duration::from_millis(600) * u32::try_from(calls.len())?, "they took {took:?}");
    server.start_again().await?;
    let again = async {
        loop {
            match queue(&journal, 2).await {
                Ok(entry) => return entry,
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    };
    let entry = tokio::time::timeout(SOON, again).await?;
    ensure!(view.reached(entry.sequence, SOON).await, "the view catches up by itself");
    ensure!(view.active().len() == 2);
    Ok(())
}

#[tokio::test]
async fn a_connection_lost_under_a_call_is_not_waited_for() -> Result<()> {
    let mut server = nats::run_server().await?;
    let bus = provisioned(&server.url(), 1).await?;
    let journal = Journal::open(&bus).await?;
    // It takes the call, and never answers.
    server.pause()?;
    let key = records::queued("x", [1; 10])?.image_key();
    let reading = journal.last_of_image(&key);
    let killed = async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        server.kill();
        Instant::now()
    };
    let (read, killed) = tokio::join!(reading, killed);
    ensure!(matches!(read, Err(BusError::Unavailable { .. })), "{read:?}");
    ensure!(killed.elapsed() < Duration::from_secs(2), "it took {:?} more", killed.elapsed());
    Ok(())
}

#[tokio::test]
async fn a_view_whose_stream_is_made_anew_begins_anew_and_says_so() -> Result<()> {
    let server = nats::run_server().await?;
    let bus = provisioned(&server.url(), 1).await?;
    let journal = Journal::open(&bus).await?;
    let view = View::start(&bus, 100, &TaskTracker::new(), &CancellationToken::new());
    let before = queue(&journal, 1).await?;
    ensure!(view.reached(before.sequence, SOON).await);
    let mut changes = view.changes();
    by_hand(&server).await?.delete_stream(subject::JOURNAL_STREAM).await?;
    bus.provision(&layout(1)).await?;
    // As many events as before, and more: that they are others shows nowhere but in the stream's own age.
    for n in 2..6 {
        queue(&journal, n).await?;
    }
    let anew = async {
        while !matches!(changes.recv().await?, News::BegunAnew) {}
        anyhow::Ok(())
    };
    tokio::time::timeout(SOON, anew).await??;
    tokio::time::timeout(SOON, view.caught_up()).await?;
    ensure!(view.get(&before.record.id).is_none(), "what the stream doesn't hold isn't");
    ensure!(view.active().len() == 4, "{}", view.active().len());
    let later = queue(&journal, 7).await?;
    ensure!(view.reached(later.sequence, SOON).await && view.get(&later.record.id).is_some());
    Ok(())
}

#[tokio::test]
async fn a_purged_journal_is_seen_and_an_append_to_what_is_gone_says_so() -> Result<()> {
    let server = nats::run_server().await?;
    let bus = provisioned(&server.url(), 1).await?;
    let journal = Journal::open(&bus).await?;
    let view = View::start(&bus, 100, &TaskTracker::new(), &CancellationToken::new());
    let lost = queue(&journal, 1).await?;
    ensure!(view.reached(lost.sequence, SOON).await);
    let mut changes = view.changes();
    by_hand(&server).await?.get_stream(subject::JOURNAL_STREAM).await?.purge().await?;
    let by = instance(1)?;
    let begun = Instant::now();
    let appended = journal.append(Some(&lost), &Change::Claimed { by: by.clone() }, &by).await;
    ensure!(matches!(appended, Err(AppendError::Gone)), "{appended:?}");
    ensure!(begun.elapsed() < Duration::from_secs(3));
    ensure!(matches!(tokio::time::timeout(SOON, changes.recv()).await??, News::BegunAnew));
    ensure!(view.active().is_empty());
    Ok(())
}

#[tokio::test]
async fn a_view_whose_consumer_was_deleted_makes_another() -> Result<()> {
    let server = nats::run_server().await?;
    let bus = provisioned(&server.url(), 1).await?;
    let keeper = keeper(&bus, &layout(1));
    let journal = Journal::open(&bus).await?;
    let view = View::start(&bus, 100, &TaskTracker::new(), &CancellationToken::new());
    let first = queue(&journal, 1).await?;
    ensure!(view.reached(first.sequence, SOON).await);
    let stream = by_hand(&server).await?.get_stream(subject::JOURNAL_STREAM).await?;
    let consumers: Vec<String> = stream.consumer_names().try_collect().await?;
    ensure!(!consumers.is_empty());
    for consumer in consumers {
        stream.delete_consumer(&consumer).await?;
    }
    let second = queue(&journal, 2).await?;
    ensure!(view.reached(second.sequence, Duration::from_secs(60)).await, "it stands still");
    ensure!(view.active().len() == 2);
    let what = format!("part=\"{}\",what=\"consumer_gone\"", subject::JOURNAL_STREAM);
    keeper.shows(&format!("kiln_bus_troubles_total{{{what}}} 1")).await?;
    keeper.shows(&format!("kiln_bus_trouble{{{what}}} 0")).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_without_its_majority_is_an_error_soon_and_heals() -> Result<()> {
    let mut cluster = nats::run_cluster(3).await?;
    let urls: Vec<_> = cluster.nodes.iter().map(nats::NatsServer::url).collect();
    let bus = provisioned(&urls.join(","), 3).await?;
    let (journal, secrets) = (Journal::open(&bus).await?, SecretsBucket::open(&bus).await?);
    let view = View::start(&bus, 100, &TaskTracker::new(), &CancellationToken::new());
    let before = queue(&journal, 1).await?;
    for node in &mut cluster.nodes[1..] {
        node.kill();
    }
    // What the servers don't answer ends at the bus's own limits: ten seconds for an append, five for a read.
    let begun = Instant::now();
    let record = records::queued("lost", [9; 10])?;
    let appended = journal.append(None, &Change::Queued(Box::new(record.clone())), &instance(1)?).await;
    ensure!(matches!(appended, Err(AppendError::Bus(BusError::Unavailable { .. }))), "{appended:?}");
    let put = secrets.put(&record.id, "x".into()).await;
    ensure!(matches!(put, Err(BusError::Unavailable { .. })), "{put:?}");
    ensure!(begun.elapsed() < Duration::from_secs(30), "they took {:?}", begun.elapsed());
    for node in &mut cluster.nodes[1..] {
        node.start_again().await?;
    }
    let mut refusal = None;
    let again = async {
        // Another build each time: one whose answer was lost may have been queued.
        for n in 10.. {
            match queue(&journal, n).await {
                Ok(entry) => return Ok(entry),
                Err(error) => refusal = Some(error),
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        anyhow::bail!("too many tries")
    };
    let after = tokio::time::timeout(Duration::from_secs(90), again).await;
    let after = after.with_context(|| format!("last refused: {refusal:?}"))??;
    ensure!(view.reached(after.sequence, Duration::from_secs(60)).await, "the view catches up by itself");
    ensure!(view.get(&before.record.id).is_some() && view.get(&after.record.id).is_some());
    Ok(())
}

#[tokio::test]
async fn a_log_whose_stream_was_deleted_goes_on_at_its_offset_for_who_follows() -> Result<()> {
    let server = nats::run_server().await?;
    let bus = provisioned(&server.url(), 1).await?;
    let logs = Logs::new(&bus);
    let id = records::queued("x", [1; 10])?.id;
    let mut writer = logs.claim(&id, &instance(1)?, None).await?;
    let source = Source::beginning();
    writer.append("before ".into(), source.clone(), false).await?;
    // A follower that has all of it, and one that begins when it is gone.
    let mut follower = std::pin::pin!(logs.read(&id, Start::Beginning, to_the_end()));
    let first = next(&mut follower).await?;
    ensure!(first.bytes == "before ");
    by_hand(&server).await?.delete_stream(subject::LOGS_STREAM).await?;
    bus.provision(&layout(1)).await?;
    let gone = writer.append("lost?".into(), source.clone(), false).await;
    ensure!(matches!(gone, Err(log::AppendError::Emptied { end: 7, .. })), "{gone:?}");
    writer.append("after".into(), source.clone(), false).await?;
    let second = next(&mut follower).await?;
    ensure!(second.offset == 7 && second.bytes == "after", "{second:?}");
    let late = logs.read(&id, Start::Offset(0), to_the_end());
    let late = next(&mut std::pin::pin!(late)).await;
    let discarded = late.err().context("bytes that are gone")?;
    ensure!(discarded.to_string().contains("begins at byte 7 now: byte 0 is kept no more"), "{discarded}");
    let kept = logs.read(&id, Start::Beginning, to_the_end());
    ensure!(next(&mut std::pin::pin!(kept)).await?.offset == 7);
    writer.append(Bytes::new(), source, true).await?;
    ensure!(next(&mut follower).await?.complete);
    Ok(())
}

fn to_the_end() -> Until {
    Until::Complete { over: CancellationToken::new() }
}

async fn next(chunks: &mut (impl Stream<Item = Result<Chunk, LogError>> + Unpin)) -> Result<Chunk> {
    Ok(tokio::time::timeout(SOON, chunks.next()).await?.context("the read ended")??)
}
