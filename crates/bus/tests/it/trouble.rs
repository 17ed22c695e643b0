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
        ("room", journal.room().await.err().map(code)),
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
