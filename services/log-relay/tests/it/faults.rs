//! What may happen while a builder writes. Each time the log must be what it wrote, to the byte.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use futures::TryStreamExt as _;
use kiln_bus::Bus;
use kiln_bus::logs::Logs;
use kiln_domain::id::BuildId;
use kiln_log_relay::Config;
use kiln_testkit::nats::{NatsServer, run_cluster, run_server};
use rand::rngs::SmallRng;
use rand::{Rng as _, RngExt as _, SeedableRng as _};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::SECRET;
use crate::bed::{Bed, LONG, Play, append, follow};

/// Bytes a second of a slow reader.
const CRAWL: f64 = 10_000.0;

/// Bytes of every value, in pieces of every size.
fn pieces(seed: u64, length: usize) -> Vec<Vec<u8>> {
    let mut random = SmallRng::seed_from_u64(seed);
    let mut bytes = vec![0; length];
    random.fill_bytes(&mut bytes);
    let mut pieces = Vec::new();
    while !bytes.is_empty() {
        let rest = bytes.split_off(random.random_range(1..=30_000).min(bytes.len()));
        pieces.push(std::mem::replace(&mut bytes, rest));
    }
    pieces
}

/// Some who follow a log from before its first byte.
fn followers(logs: &Logs, id: &BuildId, count: usize) -> JoinSet<Result<Vec<u8>>> {
    let mut followers = JoinSet::new();
    for _ in 0..count {
        followers.spawn(follow(logs, id).try_fold(Vec::new(), append));
    }
    followers
}

async fn until(bus: &Bus, answers: bool) -> Result<()> {
    let waiting = async {
        while bus.answers(Duration::from_millis(300)).await != answers {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(LONG, waiting).await.with_context(|| format!("the bus: answers {answers}"))
}

async fn finish(
    bed: &Bed,
    play: &mut Play,
    mut followers: JoinSet<Result<Vec<u8>>>,
    all: &[u8],
) -> Result<()> {
    play.end();
    play.succeed().await?;
    assert!(bed.log(&play.id).await? == all);
    while let Some(read) = followers.join_next().await {
        assert!(read?? == all);
    }
    Ok(())
}

#[tokio::test]
async fn killed_at_twenty_points_relays_leave_no_gap_and_no_repeat() -> Result<()> {
    let bed = Bed::new().await?;
    let mut play = bed.build(1, SECRET).await?;
    play.start().await?;
    let following = followers(&bed.logs, &play.id, 2);
    let mut random = SmallRng::seed_from_u64(11);
    let mut expected = String::new();
    for number in 0..20 {
        let relay = bed.relay(&format!("life-{number}")).await?;
        for line in 0..random.random_range(1..400) {
            let line = format!("{number}.{line} {} {}\n", SECRET, "x".repeat(random.random_range(0..200)));
            expected.push_str(&line.replace(SECRET, "***"));
            let (head, tail) = line.split_at(random.random_range(0..line.len()));
            play.write(head.to_owned());
            play.write(tail.to_owned());
        }
        let at = random.random_range(0..=expected.len() as u64);
        bed.tail(&play.id, |tail| tail.end >= at).await?;
        relay.kill(&bed).await?;
    }
    let _last = bed.relay("last").await?;
    finish(&bed, &mut play, following, expected.as_bytes()).await
}

/// The builder goes on while the bus is away, at least for `lasts` and until relay and readers have met that.
async fn outage(
    mut server: NatsServer,
    lasts: Duration,
    away: impl Fn(&mut NatsServer) -> Result<()>,
    back: impl AsyncFn(&mut NatsServer) -> Result<()>,
) -> Result<()> {
    let bed = Bed::on(&server.url(), 1).await?;
    let _relay = bed.relay("a").await?;
    let mut play = bed.build(1, SECRET).await?;
    play.start().await?;
    let following = followers(&bed.logs, &play.id, 3);
    let pieces = pieces(1, 2_000_000);
    let (before, after) = pieces.split_at(pieces.len() / 2);
    before.iter().for_each(|piece| play.write(piece.clone()));
    bed.tail(&play.id, |tail| tail.end > 0).await?;
    away(&mut server)?;
    after.iter().for_each(|piece| play.write(piece.clone()));
    until(&bed.bus, false).await?;
    tokio::time::sleep(lasts).await;
    back(&mut server).await?;
    until(&bed.bus, true).await?;
    finish(&bed, &mut play, following, &pieces.concat()).await
}

#[tokio::test]
async fn nats_that_is_away_for_ten_seconds_in_mid_log_costs_no_byte() -> Result<()> {
    let away = |server: &mut NatsServer| {
        server.kill();
        Ok(())
    };
    outage(run_server().await?, Duration::from_secs(10), away, async |server| server.start_again().await)
        .await
}

#[tokio::test]
async fn nats_that_stands_still_in_mid_log_costs_no_byte() -> Result<()> {
    let away = |server: &mut NatsServer| server.pause();
    outage(run_server().await?, Duration::ZERO, away, async |server| server.resume()).await
}

#[tokio::test]
async fn a_cluster_whose_leader_is_killed_in_mid_log_loses_no_byte() -> Result<()> {
    let mut cluster = run_cluster(3).await?;
    let bed = Bed::on(&cluster.url(), 3).await?;
    let _relay = bed.relay("a").await?;
    let mut play = bed.build(1, SECRET).await?;
    play.start().await?;
    let following = followers(&bed.logs, &play.id, 3);
    let pieces = pieces(2, 2_000_000);
    let (before, after) = pieces.split_at(pieces.len() / 2);
    before.iter().for_each(|piece| play.write(piece.clone()));
    bed.tail(&play.id, |tail| tail.end > 0).await?;
    let leader = cluster.leader_of(kiln_contract::subject::LOGS_STREAM).await?;
    cluster.nodes.get_mut(leader).context("no such node")?.kill();
    after.iter().for_each(|piece| play.write(piece.clone()));
    let length = pieces.concat().len() as u64;
    // Without the node that led, which may have led the journal, too.
    bed.tail(&play.id, |tail| tail.end == length).await?;
    play.journal_is_led().await?;
    finish(&bed, &mut play, following, &pieces.concat()).await
}

#[tokio::test]
async fn bytes_are_bytes_however_strange() -> Result<()> {
    let bed = Bed::new().await?;
    let _relay = bed.relay("a").await?;
    let mut play = bed.build(1, SECRET).await?;
    play.start().await?;
    let line = "x".repeat(10 << 20);
    let (head, tail) = line.split_at(line.len() / 2);
    let strange: [&[u8]; 6] =
        [b"10%\r20%\r100%\r\n", b"\0\0", b"\x1b[2J\x1b]0;title\x07", b"\xff\xfe\xc3", b"\n\n\r\r", b""];
    for piece in strange {
        play.write(piece.to_vec());
    }
    play.write(format!("{head}{SECRET}{tail}\n"));
    for piece in strange {
        play.write(piece.to_vec());
    }
    let expected = [&strange.concat(), format!("{head}***{tail}\n").as_bytes(), &strange.concat()].concat();
    let following = followers(&bed.logs, &play.id, 1);
    finish(&bed, &mut play, following, &expected).await
}

/// Of the test's process, in bytes.
fn resident() -> Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    let kib: u64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kib * 1024)
}

/// How far the memory of this process goes up and down until `stop`. Other tests of it have their part in that.
async fn breath(stop: CancellationToken) -> Result<u64> {
    let (mut least, mut most) = (u64::MAX, 0);
    loop {
        let now = resident()?;
        (least, most) = (least.min(now), most.max(now));
        if stop.run_until_cancelled(tokio::time::sleep(Duration::from_millis(20))).await.is_none() {
            return Ok(most - least);
        }
    }
}

/// Follows a log and compares it with what it should be, without keeping it. Until it is to `hurry`, it takes
/// [`CRAWL`] bytes a second.
async fn compare(logs: Logs, id: BuildId, expected: Arc<Vec<u8>>, hurry: CancellationToken) -> Result<()> {
    let (mut end, mut log) = (0, follow(&logs, &id));
    while let Some(bytes) = log.try_next().await? {
        let same = expected.get(end..end + bytes.len()).is_some_and(|expected| expected == bytes);
        ensure!(same, "another byte after {end}");
        end += bytes.len();
        let rest = Duration::from_secs_f64(bytes.len() as f64 / CRAWL);
        hurry.run_until_cancelled(tokio::time::sleep(rest)).await;
    }
    ensure!(end == expected.len(), "{end} bytes of {}", expected.len());
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_that_crawl_slow_nobody_and_take_no_memory() -> Result<()> {
    const READERS: usize = 50;
    #[expect(clippy::disallowed_methods, reason = "how a person asks for a longer run of this test")]
    let mib: usize = std::env::var("TEST_LOG_MIB").map_or(Ok(20), |mib| mib.parse())?;
    let mut output = vec![0; mib << 20];
    SmallRng::seed_from_u64(3).fill_bytes(&mut output);
    let output = Arc::new(output);
    let bed = Bed::new().await?;
    let _relay = bed.relay_with(Config { max_log_bytes: 1 << 30, ..Config::default() }, "a").await?;
    let mut play = bed.build(1, SECRET).await?;
    play.start().await?;
    let logs = bed.logs_elsewhere().await?;
    let (mut running, mut crawling) = (JoinSet::new(), JoinSet::new());
    let (at_once, hurry) = (CancellationToken::new(), CancellationToken::new());
    at_once.cancel();
    for _ in 0..READERS {
        let reader =
            |hurry: &CancellationToken| compare(logs.clone(), play.id.clone(), output.clone(), hurry.clone());
        running.spawn(reader(&at_once));
        crawling.spawn(reader(&hurry));
    }
    let (mut watching, stop) = (JoinSet::new(), CancellationToken::new());
    watching.spawn(breath(stop.clone()));
    for piece in output.chunks(1 << 20) {
        play.write(piece.to_vec());
    }
    play.end();
    play.succeed().await?;
    while let Some(read) = running.join_next().await {
        read??;
    }
    // Those who ran are at the end, and of those who crawl nobody is.
    assert!(crawling.try_join_next().is_none());
    hurry.cancel();
    while let Some(read) = crawling.join_next().await {
        read??;
    }
    stop.cancel();
    let most = watching.join_next().await.context("nobody watched")???;
    // The output itself is held by the engine, and by NATS's client on its way. A copy for each reader would be far more.
    let bound = 2 * output.len() as u64 + (200 << 20);
    assert!(most < bound, "{} MiB more", most >> 20);
    println!("{mib} MiB of log, {} readers: {} MiB at most", 2 * READERS, most >> 20);
    Ok(())
}
