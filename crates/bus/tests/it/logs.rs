//! The log stream against a real nats-server, alone and as a cluster of three: what is written is what is read, by
//! every way of reading, whatever happens in between.

use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use async_nats::jetstream::stream;
use bytes::Bytes;
use futures::{FutureExt as _, StreamExt as _};
use kiln_bus::layout::Layout;
use kiln_bus::logs::{AppendError, CHUNK_BYTES, Extent, LogError, LogWriter, Logs, Source, Start, Until};
use kiln_bus::secrets::SecretsBucket;
use kiln_bus::{Bus, Connect};
use kiln_contract::subject;
use kiln_domain::engine::Cursor;
use kiln_domain::id::{BuildId, ImageKey, InstanceId};
use kiln_testkit::nats::{run_cluster, run_server};
use kiln_testkit::wire::Wire;
use rand::rngs::SmallRng;
use rand::{Rng as _, RngExt as _, SeedableRng as _};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

const LONG: Duration = Duration::from_secs(60);

async fn connect(url: &str) -> Result<Bus> {
    let connect = Connect { url: url.to_owned(), user: None, password: None, name: "test".into() };
    Ok(connect.connect().await?)
}

async fn provisioned(url: &str, replicas: usize) -> Result<Bus> {
    let bus = connect(url).await?;
    let layout = Layout {
        replicas,
        journal_max_bytes: 64 << 20,
        logs_max_bytes: 256 << 20,
        logs_max_age: Duration::from_secs(3600),
    };
    bus.provision(&layout).await?;
    Ok(bus)
}

fn build(number: u8) -> BuildId {
    BuildId::new(&ImageKey::of("r/x:y"), [number; 10])
}

fn instance(number: u64) -> InstanceId {
    InstanceId::new("log-relay", number).unwrap()
}

fn source(position: usize) -> Source {
    Source { attempt: 1, cursor: Cursor::new(position.to_string()) }
}

fn to_the_end() -> Until {
    Until::Complete { over: CancellationToken::new() }
}

/// Some bytes of every value, and where they are cut.
fn random_log(seed: u64, length: usize, largest: usize) -> Vec<Bytes> {
    let mut random = SmallRng::seed_from_u64(seed);
    let mut log = vec![0; length];
    random.fill_bytes(&mut log);
    let mut log = Bytes::from(log);
    let mut chunks = Vec::new();
    while !log.is_empty() {
        chunks.push(log.split_to(random.random_range(1..=largest).min(log.len())));
    }
    chunks
}

async fn write(writer: &mut LogWriter, chunks: &[Bytes]) -> Result<()> {
    let mut position = usize::try_from(writer.end())?;
    for chunk in chunks {
        position += chunk.len();
        writer.append(chunk.clone(), source(position), false).await?;
    }
    Ok(())
}

async fn complete(writer: &mut LogWriter) -> Result<()> {
    let source = writer.source().clone();
    Ok(writer.append(Bytes::new(), source, true).await?)
}

/// Reads all, and checks that each chunk begins where the one before ended.
async fn read(logs: &Logs, id: &BuildId, start: Start, until: Until) -> Result<(u64, Vec<u8>, bool)> {
    let mut chunks = std::pin::pin!(logs.read(id, start, until));
    let (mut first, mut bytes, mut complete) = (None, Vec::new(), false);
    let reading = async {
        while let Some(chunk) = chunks.next().await {
            let chunk = chunk?;
            let begun = *first.get_or_insert(chunk.offset);
            assert_eq!(chunk.offset, begun + bytes.len() as u64, "a gap or a repeat");
            assert!(chunk.bytes.len() <= CHUNK_BYTES);
            bytes.extend_from_slice(&chunk.bytes);
            complete = chunk.complete;
        }
        Ok::<(), LogError>(())
    };
    tokio::time::timeout(LONG, reading).await.context("the read does not end")??;
    Ok((first.unwrap_or_default(), bytes, complete))
}

async fn one_of_two_writers_wins(bus: &Bus) -> Result<()> {
    let (logs, id) = (Logs::new(bus), build(1));
    let mut wins = [0; 2];
    for round in 0..20u64 {
        let tail = logs.tail(&id).await?;
        let (me, other) = (instance(2 * round), instance(2 * round + 1));
        let (a, b) =
            tokio::join!(logs.claim(&id, &me, tail.as_ref()), logs.claim(&id, &other, tail.as_ref()));
        let (mut winner, who) = match (a, b) {
            (Ok(winner), Err(AppendError::Replaced { .. })) => (winner, 0),
            (Err(AppendError::Replaced { .. }), Ok(winner)) => (winner, 1),
            (Ok(_), Ok(_)) => bail!("both have claimed it"),
            (a, b) => bail!("nobody has claimed it: {:?}, {:?}", a.err(), b.err()),
        };
        wins[who] += 1;
        let text = Bytes::from(format!("round {round}\n"));
        let from = winner.end();
        winner.append(text.clone(), source(usize::try_from(winner.end())? + text.len()), false).await?;
        let tail = logs.tail(&id).await?.context("no tail")?;
        assert_eq!((tail.end, &tail.source), (from + text.len() as u64, winner.source()));
        // Claimed by a third, the winner can write no more.
        logs.claim(&id, &instance(1000), Some(&tail)).await?;
        let late = winner.append("late".into(), source(0), false).await;
        assert!(matches!(late, Err(AppendError::Replaced { .. })), "{late:?}");
    }
    let (_, bytes, _) = read(&logs, &id, Start::Beginning, Until::Now).await?;
    let expected: String = (0..20).map(|round| format!("round {round}\n")).collect();
    assert_eq!(bytes, expected.as_bytes());
    Ok(())
}

#[tokio::test]
async fn one_of_two_writers_wins_alone() -> Result<()> {
    let server = run_server().await?;
    one_of_two_writers_wins(&provisioned(&server.url(), 1).await?).await
}

#[tokio::test]
async fn one_of_two_writers_wins_in_a_cluster() -> Result<()> {
    let cluster = run_cluster(3).await?;
    one_of_two_writers_wins(&provisioned(&cluster.url(), 3).await?).await
}

/// Followers of every kind, while the log grows.
async fn all_read_the_same(writing: &Bus, reading: &Bus) -> Result<()> {
    for (number, largest) in [(1, 40), (2, 5_000), (3, CHUNK_BYTES)] {
        let (id, logs) = (build(number), Logs::new(reading));
        let chunks = random_log(u64::from(number), 300 * largest.min(20_000), largest);
        let whole = chunks.concat();
        let mut readers = JoinSet::new();
        let follow = |start: Start| {
            let (logs, id) = (logs.clone(), id.clone());
            async move { read(&logs, &id, start, to_the_end()).await }
        };
        // Before there is a log.
        readers.spawn(follow(Start::Beginning));
        let writing = Logs::new(writing);
        let mut writer = writing.claim(&id, &instance(1), None).await?;
        let (early, late) = chunks.split_at(chunks.len() / 2);
        write(&mut writer, early).await?;
        for start in [Start::Beginning, Start::Tail(1_000), Start::Offset(writer.end()), Start::Offset(17)] {
            readers.spawn(follow(start));
        }
        // Resumed by another writer.
        let tail = writing.tail(&id).await?;
        let mut writer = writing.claim(&id, &instance(2), tail.as_ref()).await?;
        assert_eq!(writer.source(), &source(early.concat().len()));
        write(&mut writer, late).await?;
        complete(&mut writer).await?;
        while let Some(read) = readers.join_next().await {
            let (first, bytes, complete) = read??;
            assert!(complete);
            assert!(bytes == whole[usize::try_from(first)?..], "from {first}: {} bytes", bytes.len());
        }
        let (first, bytes, complete) = read(&logs, &id, Start::Tail(10), Until::Now).await?;
        assert_eq!(
            (first, bytes.as_slice(), complete),
            (whole.len() as u64 - 10, &whole[whole.len() - 10..], true)
        );
        let (_, bytes, _) = read(&logs, &id, Start::Beginning, Until::Now).await?;
        assert!(bytes == whole);
    }
    Ok(())
}

#[tokio::test]
async fn all_read_the_same_alone() -> Result<()> {
    let server = run_server().await?;
    all_read_the_same(&provisioned(&server.url(), 1).await?, &connect(&server.url()).await?).await
}

#[tokio::test]
async fn all_read_the_same_in_a_cluster() -> Result<()> {
    let cluster = run_cluster(3).await?;
    let bus = provisioned(&cluster.url(), 3).await?;
    all_read_the_same(&bus, &connect(&cluster.nodes[1].url()).await?).await
}

#[tokio::test]
async fn a_read_is_resumed_at_any_offset() -> Result<()> {
    let server = run_server().await?;
    let bus = provisioned(&server.url(), 1).await?;
    let (logs, id) = (Logs::new(&bus), build(1));
    let chunks = random_log(7, 400_000, 3_000);
    let whole = chunks.concat();
    let mut writer = logs.claim(&id, &instance(1), None).await?;
    // Another log between, so that sequences are no count of this one's chunks.
    let mut other = logs.claim(&build(2), &instance(1), None).await?;
    for chunk in &chunks {
        write(&mut writer, std::slice::from_ref(chunk)).await?;
        write(&mut other, &["other".into(), "other".into()]).await?;
    }
    complete(&mut writer).await?;
    let mut random = SmallRng::seed_from_u64(1);
    let mut bytes = Vec::new();
    let mut resumed = 0;
    'whole: loop {
        let mut part = std::pin::pin!(logs.read(&id, Start::Offset(bytes.len() as u64), to_the_end()));
        resumed += 1;
        for _ in 0..random.random_range(1..4) {
            let Some(chunk) = part.next().await else { break 'whole };
            let chunk = chunk?;
            assert_eq!(chunk.offset, bytes.len() as u64);
            // A client that was cut off in the middle of a chunk.
            let kept =
                if chunk.complete { chunk.bytes.len() } else { random.random_range(0..=chunk.bytes.len()) };
            bytes.extend_from_slice(&chunk.bytes[..kept]);
            if chunk.complete {
                break 'whole;
            }
            if kept < chunk.bytes.len() {
                break;
            }
        }
    }
    assert!(bytes == whole);
    assert!(resumed >= 100, "resumed {resumed} times");
    for offset in 0..=whole.len() as u64 {
        if offset % 9_973 == 0 || offset == whole.len() as u64 {
            let (_, bytes, _) = read(&logs, &id, Start::Offset(offset), Until::Now).await?;
            assert!(bytes == whole[usize::try_from(offset)?..], "from {offset}");
        }
    }
    Ok(())
}

#[tokio::test]
async fn a_follower_behind_the_ring_slows_nobody_and_misses_nothing() -> Result<()> {
    let server = run_server().await?;
    let bus = provisioned(&server.url(), 1).await?;
    let (logs, id) = (Logs::new(&bus), build(1));
    let mut writer = logs.claim(&id, &instance(1), None).await?;
    write(&mut writer, &["first".into()]).await?;
    let mut slow = std::pin::pin!(logs.read(&id, Start::Beginning, to_the_end()));
    assert_eq!(slow.next().await.context("ended")??.bytes, "first");
    let fast = tokio::task::JoinSet::from_iter([{
        let (logs, id) = (logs.clone(), id.clone());
        async move { read(&logs, &id, Start::Beginning, to_the_end()).await }
    }]);
    let chunks = random_log(3, 500_000, 1_000);
    write(&mut writer, &chunks).await?;
    complete(&mut writer).await?;
    let whole = [Bytes::from("first").as_ref(), &chunks.concat()].concat();
    let fast = fast.join_all().await.pop().context("no reader")??;
    assert!(fast.1 == whole);
    let mut bytes = b"first".to_vec();
    while let Some(chunk) = slow.next().await {
        bytes.extend_from_slice(&chunk?.bytes);
    }
    assert!(bytes == whole);
    Ok(())
}

#[tokio::test]
async fn an_append_whose_answer_was_lost_is_made_once() -> Result<()> {
    let server = run_server().await?;
    let bus = provisioned(&server.url(), 1).await?;
    let wire = Wire::to(&server.address()).await?;
    let cut_off = Logs::new(&connect(&format!("nats://{}", wire.address())).await?);
    let (logs, id) = (Logs::new(&bus), build(1));
    let mut writer = cut_off.claim(&id, &instance(1), None).await?;
    write(&mut writer, &["a".into()]).await?;
    let stored = logs.tail(&id).await?.context("no tail")?;
    wire.lose_answers();
    let appended = {
        let (logs, id, wire) = (&logs, &id, &wire);
        let arrived = async move {
            while logs.tail(id).await?.is_some_and(|tail| tail.sequence == stored.sequence) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            wire.restore();
            anyhow::Ok(())
        };
        tokio::join!(writer.append("b".into(), source(2), false), arrived)
    };
    appended.0?;
    appended.1?;
    write(&mut writer, &["c".into()]).await?;
    complete(&mut writer).await?;
    assert_eq!(read(&logs, &id, Start::Beginning, Until::Now).await?, (0, b"abc".to_vec(), true));
    Ok(())
}

#[tokio::test]
async fn a_follower_that_was_cut_off_at_the_end_gets_the_end() -> Result<()> {
    let server = run_server().await?;
    let bus = provisioned(&server.url(), 1).await?;
    let wire = Wire::to(&server.address()).await?;
    let cut_off = Logs::new(&connect(&format!("nats://{}", wire.address())).await?);
    let (logs, id) = (Logs::new(&bus), build(1));
    let mut writer = logs.claim(&id, &instance(1), None).await?;
    write(&mut writer, &["a".into()]).await?;
    let mut follower = std::pin::pin!(cut_off.read(&id, Start::Beginning, to_the_end()));
    assert_eq!(follower.next().await.context("ended")??.bytes, "a");
    wire.cut();
    write(&mut writer, &["b".into(), "c".into()]).await?;
    complete(&mut writer).await?;
    wire.restore();
    let mut rest = Vec::new();
    while let Some(chunk) = tokio::time::timeout(LONG, follower.next()).await? {
        rest.extend_from_slice(&chunk?.bytes);
    }
    assert_eq!(rest, b"bc");
    Ok(())
}

#[tokio::test]
async fn writer_and_followers_outlast_a_server_that_is_killed() -> Result<()> {
    let mut server = run_server().await?;
    let bus = provisioned(&server.url(), 1).await?;
    let (logs, id) = (Logs::new(&bus), build(1));
    let mut writer = logs.claim(&id, &instance(1), None).await?;
    let chunks = random_log(5, 400_000, 1_000);
    let writing = async {
        write(&mut writer, &chunks).await?;
        complete(&mut writer).await
    };
    let killing = async {
        while logs.tail(&id).await?.is_some_and(|tail| tail.end < 50_000) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        server.kill();
        server.start_again().await
    };
    let reading = read(&logs, &id, Start::Beginning, to_the_end());
    let (written, killed, read) = tokio::join!(writing, killing, reading);
    written?;
    killed?;
    assert!(read?.1 == chunks.concat());
    Ok(())
}

#[tokio::test]
async fn what_is_not_there_is_said() -> Result<()> {
    let server = run_server().await?;
    let bus = provisioned(&server.url(), 1).await?;
    let logs = Logs::new(&bus);
    let id = build(1);
    let failed = async |id: &BuildId, start, until| {
        read(&logs, id, start, until).await.map_err(|error| error.downcast::<LogError>())
    };
    let none = failed(&id, Start::Beginning, Until::Now).await;
    assert!(matches!(none, Err(Ok(LogError::NotFound { .. }))), "{none:?}");
    let beyond = failed(&id, Start::Offset(1), to_the_end()).await;
    assert!(matches!(beyond, Err(Ok(LogError::Beyond { wanted: 1, end: 0, .. }))), "{beyond:?}");

    let mut writer = logs.claim(&id, &instance(1), None).await?;
    write(&mut writer, &["0123456789".into(), "abc".into()]).await?;
    let beyond = failed(&id, Start::Offset(14), Until::Now).await;
    assert!(matches!(beyond, Err(Ok(LogError::Beyond { wanted: 14, end: 13, .. }))), "{beyond:?}");
    assert_eq!(read(&logs, &id, Start::Offset(13), Until::Now).await?.1, b"");
    let before = logs.info(&id).await?.context("no info")?;
    assert_eq!(before.extent, Extent { first: 0, end: 13, complete: false });
    // The claim is a message, too.
    assert_eq!((before.chunks, before.limited, before.max_age.as_secs()), (3, false, 3600));
    assert_eq!((before.max_bytes, before.all_max_bytes), (None, Some(256 << 20)));
    assert!(before.all_bytes > before.extent.end, "{before:?}");

    // As retention does it: the first messages go.
    let js = async_nats::jetstream::new(async_nats::connect(server.url()).await?);
    let stream: stream::Stream = js.get_stream(subject::LOGS_STREAM).await?;
    let first = stream.get_last_raw_message_by_subject(&subject::log(&id)).await?.sequence;
    stream.purge().filter(subject::log(&id)).sequence(first).await?;
    let discarded = failed(&id, Start::Offset(3), Until::Now).await;
    assert!(matches!(discarded, Err(Ok(LogError::Discarded { wanted: 3, first: 10, .. }))), "{discarded:?}");
    assert_eq!(read(&logs, &id, Start::Beginning, Until::Now).await?, (10, b"abc".to_vec(), false));
    assert_eq!(read(&logs, &id, Start::Tail(100), Until::Now).await?, (10, b"abc".to_vec(), false));

    let after = logs.info(&id).await?.context("no info")?;
    assert_eq!((after.extent, after.chunks), (Extent { first: 10, end: 13, complete: false }, 1));
    assert_eq!(after.stored.0, after.stored.1);
    assert!(after.stored.0 >= before.stored.0 && after.stored.1 == before.stored.1, "{before:?} {after:?}");

    // All of it goes, under a writer that hears of it and goes on.
    stream.purge().filter(subject::log(&id)).await?;
    let none = failed(&id, Start::Beginning, Until::Now).await;
    assert!(matches!(none, Err(Ok(LogError::NotFound { .. }))), "{none:?}");
    assert_eq!(logs.info(&id).await?, None);
    let emptied = write(&mut writer, &["lost".into()]).await.map_err(|error| error.downcast::<AppendError>());
    assert!(matches!(emptied, Err(Ok(AppendError::Emptied { end: 13, .. }))), "{emptied:?}");
    write(&mut writer, &["def".into()]).await?;
    // A process that read it a moment ago may still hold what is gone.
    let other = Logs::new(&bus);
    assert_eq!(read(&other, &id, Start::Beginning, Until::Now).await?, (13, b"def".to_vec(), false));
    Ok(())
}

/// The relays may be late, as while the stream has no leader: the answer must not be that there is no log.
#[tokio::test]
async fn a_log_is_waited_for_until_its_build_is_cleaned_up() -> Result<()> {
    let server = run_server().await?;
    let bus = provisioned(&server.url(), 1).await?;
    let (logs, secrets, id) = (Logs::new(&bus), SecretsBucket::open(&bus).await?, build(1));
    secrets.put(&id, "sealed".into()).await?;
    let until = to_the_end();
    let Until::Complete { over } = &until else { bail!("it follows") };
    over.cancel();
    let reading = read(&logs, &id, Start::Beginning, until.clone());
    tokio::pin!(reading);
    // Longer than what is given to a log that nobody will write.
    let early = tokio::time::timeout(Duration::from_secs(5), &mut reading).await;
    assert!(early.is_err(), "{early:?}");
    let mut writer = logs.claim(&id, &instance(1), None).await?;
    complete(&mut writer).await?;
    assert_eq!(reading.await?, (0, Vec::new(), true));

    let none = read(&logs, &build(2), Start::Beginning, until).await.map_err(|error| error.downcast());
    assert!(matches!(none, Err(Ok(LogError::NotFound { .. }))), "{none:?}");
    Ok(())
}

#[tokio::test]
async fn an_engines_cursor_must_fit_a_header() -> Result<()> {
    let server = run_server().await?;
    let bus = provisioned(&server.url(), 1).await?;
    let (logs, id) = (Logs::new(&bus), build(1));
    let mut writer = logs.claim(&id, &instance(1), None).await?;
    for cursor in ["a\r\nb", " a", "ä"] {
        let refused =
            writer.append("x".into(), Source { attempt: 1, cursor: Cursor::new(cursor) }, false).await;
        assert!(matches!(refused, Err(AppendError::Bus(_))), "{cursor:?}");
    }
    let kept = Source { attempt: 2, cursor: Cursor::new("2026-11-24T00:00:00.1Z 3") };
    writer.append("x".into(), kept.clone(), false).await?;
    assert_eq!(logs.tail(&id).await?.map(|tail| tail.source), Some(kept));
    Ok(())
}

#[tokio::test]
async fn an_offset_is_found_in_a_crowd_by_a_few_looks() -> Result<()> {
    const CHUNKS: usize = 100;
    const BETWEEN: usize = 200;
    let server = run_server().await?;
    let bus = provisioned(&server.url(), 1).await?;
    let hand = async_nats::connect(server.url()).await?;
    let js = async_nats::jetstream::new(hand.clone());
    // One log grows evenly, of the other's chunks each is longer than the one before it, by much.
    let even = |_: usize| 1_000_usize;
    let uneven = |number: usize| 10 + number.pow(3) / 100;
    for (of, length) in [(1, &even as &dyn Fn(usize) -> usize), (2, &uneven)] {
        let (logs, id) = (Logs::new(&bus), build(of));
        let mut writer = logs.claim(&id, &instance(1), None).await?;
        let mut whole = Vec::new();
        for number in 0..CHUNKS {
            let chunk = vec![number as u8; length(number)];
            whole.extend_from_slice(&chunk);
            write(&mut writer, &[chunk.into()]).await?;
            let crowd = (0..BETWEEN).map(|_| js.publish(subject::log(&build(9)), "crowd".into()));
            let stored = futures::future::try_join_all(crowd).await?;
            futures::future::try_join_all(stored.into_iter().map(IntoFuture::into_future)).await?;
        }
        complete(&mut writer).await?;
        let asked = format!("$JS.API.DIRECT.GET.{}", subject::LOGS_STREAM);
        let mut asked = hand.subscribe(asked).await?;
        let mut looks = Vec::new();
        for step in 0..50 {
            let offset = whole.len() * step / 50 + step;
            hand.flush().await?;
            while asked.next().now_or_never().is_some() {}
            // Another process, which knows nothing yet.
            let logs = Logs::new(&bus);
            let mut part = std::pin::pin!(logs.read(&id, Start::Offset(offset as u64), Until::Now));
            let first = part.next().await.context("nothing")??;
            assert_eq!(first.offset, offset as u64);
            assert!(whole[offset..].starts_with(&first.bytes), "from {offset}");
            hand.flush().await?;
            looks.push(std::iter::from_fn(|| asked.next().now_or_never()).count());
        }
        looks.sort_unstable();
        // A binary search over the 20,000 sequences would take fifteen, and one is the read itself.
        let (middle, most) = (looks[looks.len() / 2], looks[looks.len() - 1]);
        assert!(middle <= if of == 1 { 7 } else { 13 } && most <= 31, "log {of}: {looks:?}");
    }
    Ok(())
}

#[tokio::test]
async fn many_who_replay_one_log_at_once_share_the_work() -> Result<()> {
    const READERS: usize = 100;
    let server = run_server().await?;
    let bus = provisioned(&server.url(), 1).await?;
    let (logs, id) = (Logs::new(&bus), build(1));
    let chunks = random_log(4, 800_000, 8_000);
    let mut writer = logs.claim(&id, &instance(1), None).await?;
    write(&mut writer, &chunks).await?;
    complete(&mut writer).await?;
    let whole = chunks.concat();
    let listener = async_nats::connect(server.url()).await?;
    let mut asked = listener.subscribe(format!("$JS.API.DIRECT.GET.{}", subject::LOGS_STREAM)).await?;
    listener.flush().await?;
    let mut readers = JoinSet::new();
    for number in 0..READERS {
        let (logs, id) = (logs.clone(), id.clone());
        let until = if number % 2 == 0 { Until::Now } else { to_the_end() };
        readers.spawn(async move { read(&logs, &id, Start::Beginning, until).await });
    }
    while let Some(read) = readers.join_next().await {
        assert!(read??.1 == whole);
    }
    listener.flush().await?;
    let batches = std::iter::from_fn(|| asked.next().now_or_never()).count();
    let alone = chunks.len().div_ceil(64);
    // A machine that is busy may let some fall behind what is held for them.
    assert!((alone..READERS * alone / 4).contains(&batches), "{batches} batches, {alone} for one reader");
    Ok(())
}
