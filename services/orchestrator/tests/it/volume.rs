//! Many builds at once, of several owners, over two orchestrators: all end, each once and as its builder did.

use std::collections::{HashMap, HashSet};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use futures::{StreamExt as _, TryStreamExt as _};
use kiln_bus::{Lease, events};
use kiln_domain::failure::{Failure, FailureReason};
use kiln_domain::id::BuildId;
use kiln_domain::record::{Record, State};
use kiln_domain::reference::Digest;
use kiln_domain::run::{RunSpec, Work};
use kiln_orchestrator::Config;
use kiln_testkit::noop_engine::{End, NoopEngine, Plan};

use crate::stage::{Stage, config};

const BUILDS: usize = 200;
const OWNERS: usize = 3;
const SLOTS: usize = 8;
/// Who ask at once.
const CALLERS: usize = 16;
/// All of them together fill fewer slots than there are: the limit is what holds them back.
const OWNER_LIMIT: usize = 6;
/// The longest that all of it may take; it is a tenth of that on a quiet machine.
const WALL: Duration = Duration::from_secs(120);

/// By the source: the image that is copied.
fn plan(spec: &RunSpec) -> Plan {
    let n = match &spec.work {
        Work::Copy { from, .. } => number(from.repository()),
        Work::Build { .. } => 0,
    };
    let end = match (end_of(n), spec.run.attempt()) {
        (State::Failed, _) if n % 2 == 0 => {
            End::Fails(Failure::new(FailureReason::Dockerfile, "step 1 failed with exit code 1"))
        }
        (State::Failed, _) => End::Lies(Digest::of(b"nowhere")),
        (_, 1) if n % 50 == 7 => End::Vanishes,
        (_, 1) if n % 50 == 8 => End::VanishesAfterPush,
        _ => End::Pushes,
    };
    Plan { output: String::new(), takes: Duration::from_millis(200 + (n as u64 * 37) % 200), end }
}

fn number(image: &str) -> usize {
    image.rsplit('-').next().and_then(|n| n.parse().ok()).unwrap_or_default()
}

/// How the `n`th build is to end.
fn end_of(n: usize) -> State {
    if n % 10 >= 4 && n % 10 < 6 && n % 50 > 30 { State::Failed } else { State::Succeeded }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_hundred_builds_end_each_once() -> Result<()> {
    let stage = Stage::with_journal(2 << 30).await?;
    let engine = Arc::new(NoopEngine::new(stage.images(), plan));
    let config = Config { slots: SLOTS, max_running_per_owner: OWNER_LIMIT, ..config() };
    for _ in 0..2 {
        stage.orchestrator_at(&stage.url(), Lease::default(), engine.clone(), config.clone()).await?;
    }
    let mut events = pin!(events::subscribe(&stage.url(), events::From::Beginning).await?);
    let begin = |n: usize| {
        let stage = &stage;
        async move {
            let owner = format!("owner-{}", n % OWNERS);
            Ok::<_, anyhow::Error>((
                stage.begin(&format!("x-{n}"), |question| question.owner = owner).await?.id,
                n,
            ))
        }
    };
    // As many callers as a busy machine's disk keeps up with: each accept is a write that it must have.
    let numbers: HashMap<BuildId, usize> =
        futures::stream::iter((0..BUILDS).map(begin)).buffer_unordered(CALLERS).try_collect().await?;
    ensure!(numbers.len() == BUILDS, "one build of two images");

    let mut last: HashMap<BuildId, Record> = HashMap::new();
    let (mut most, mut most_of_owner, mut holders) = (0, 0, HashSet::new());
    let all = async {
        let mut ends = 0;
        while ends < BUILDS {
            let event = events.next().await.context("the events ended")??;
            let record: Record = serde_json::from_value(event.data)?;
            let before = last.insert(record.id.clone(), record.clone());
            ensure!(
                before.is_none_or(|before| !before.state.is_terminal()),
                "it went on after its end: {record:?}"
            );
            ends += usize::from(record.state.is_terminal());
            holders.extend(record.claimed_by.clone());
            let running = |owner: Option<&str>| {
                let of = |record: &&Record| owner.is_none_or(|owner| record.owner == owner);
                last.values().filter(of).filter(|record| record.claimed_by.is_some()).count()
            };
            most = most.max(running(None));
            most_of_owner = most_of_owner.max(running(Some(&record.owner)));
        }
        Ok(())
    };
    tokio::time::timeout(WALL, all).await.context("they take too long")??;

    ensure!(most <= 2 * SLOTS, "{most} at once");
    ensure!(holders.len() == 2, "{holders:?}: one of the two did nothing");
    ensure!(most_of_owner <= OWNER_LIMIT + 2, "{most_of_owner} of one owner at once");
    for (id, n) in &numbers {
        let record = last.get(id).context("a build")?;
        ensure!(record.state == end_of(*n), "{n}: {record:?}");
        ensure!(record.digest == stage.image(&record.target_ref), "{n}: image and state differ");
        ensure!(record.attempt == if n % 50 == 7 { 2 } else { 1 }, "{n}: {record:?}");
        ensure!(record.claims == 1, "{n}: it changed hands");
    }
    Ok(())
}
