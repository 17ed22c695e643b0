//! The chaos run: many builds by many callers while processes are killed, paused and cut off, and then a look at whether every
//! promise was kept. Short with all tests, long by `just chaos`.

mod callers;
mod faults;
mod outputs;
mod plan;
mod sources;
mod verdict;
mod world;

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use tempfile::TempDir;
use tokio::sync::watch;
use tokio::time::{Instant, timeout};

use self::faults::Done;
use self::outputs::Outputs;
use self::plan::{Plan, Size};
use self::verdict::Evidence;
use self::world::World;

/// What may be said of a run in the environment.
struct Settings {
    seed: u64,
    size: Size,
    /// After this long no further build is begun.
    limit: Duration,
    /// Callers at work at once.
    callers: usize,
}

/// Everything must have come to its end so long after the last build was begun.
const SETTLING: Duration = Duration::from_secs(300);

#[tokio::test(flavor = "multi_thread")]
async fn every_promise_is_kept_whatever_dies() -> Result<()> {
    let settings = Settings::read()?;
    let Settings { seed, size, .. } = &settings;
    eprintln!("chaos: KILN_CHAOS_SEED={seed} replays this plan of {size:?}");
    let mut folder = TempDir::with_prefix("kiln-chaos-")?;
    let ran = run(&settings, folder.path()).await;
    end_builders(folder.path());
    unmount(folder.path());
    if ran.is_err() {
        folder.disable_cleanup(true);
    }
    let kept = folder.path().display().to_string();
    ran.with_context(|| format!("KILN_CHAOS_SEED={seed}; what the roles said is in {kept}"))
}

async fn run(settings: &Settings, folder: &Path) -> Result<()> {
    let since = Instant::now();
    let Settings { seed, size, limit, callers } = settings;
    let plan = Plan::new(*seed, *size);
    let world = World::start(folder).await?;
    let (done, outputs) = (Done::default(), Outputs::new(&world.runs(), &folder.join("outputs"))?);
    let begun = watch::Sender::new(0);
    let builds = begun.subscribe();
    let storm = async {
        let calling = callers::call(&world, &plan, *callers, since + *limit, begun);
        let befalling = faults::befall(&world, &plan.faults, plan.builds.len(), builds, &done);
        let (seen, ()) = tokio::join!(timeout(*limit + SETTLING, calling), befalling);
        let seen = seen.context("callers wait for ever")??;
        eprintln!("chaos: {} requests saw their end after {:?}; {done}", seen.len(), since.elapsed());
        world.settle().await?;
        let mut problems = verdict::cleaned_up(&world, size.builds as u64 > SHORT).await?;
        eprintln!("chaos: cleaned up after {:?}", since.elapsed());
        let evidence = Evidence::gather(&world, &plan, &seen, &done, outputs.read()?).await?;
        eprintln!("chaos: {}", evidence.summary());
        problems.extend(evidence.problems().await?);
        problems.extend(done.too_little(plan.faults.len()));
        anyhow::Ok(problems.iter().map(|problem| evidence.report(problem)).collect::<Vec<_>>())
    };
    let wrong = tokio::select! {
        wrong = storm => wrong,
        () = world.keep_up() => Ok(Vec::new()),
        () = outputs.keep() => Ok(Vec::new()),
    };
    world.keep_logs().await?;
    let mut wrong = wrong?;
    wrong.append(&mut *world.fallen.lock().expect("nobody panics with it"));
    wrong.extend(world.end().await?);
    eprintln!("chaos: over after {:?}, {} problems", since.elapsed(), wrong.len());
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

/// With more builds than this a run is long, and most of its builds are played.
const SHORT: u64 = 100;

impl Settings {
    fn read() -> Result<Self> {
        let number = |name: &str, otherwise: u64| match variable(name) {
            Some(text) => text.parse().with_context(|| format!("{name}: `{text}` is no number")),
            None => Ok(otherwise),
        };
        let builds = number("KILN_CHAOS_BUILDS", 30)?;
        Ok(Self {
            seed: number("KILN_CHAOS_SEED", u64::from(std::process::id()))?,
            size: Size {
                builds: usize::try_from(builds)?,
                faults: usize::try_from(number("KILN_CHAOS_FAULTS", 12)?)?,
                real_percent: if builds > SHORT { 12 } else { 40 },
            },
            limit: Duration::from_secs(60 * number("KILN_CHAOS_MINUTES", 5)?),
            callers: if builds > SHORT { 12 } else { 8 },
        })
    }
}

/// A variable of the environment that isn't empty.
fn variable(name: &str) -> Option<String> {
    #[expect(clippy::disallowed_methods, reason = "how large a run is to be is whoever starts it to say")]
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// Of a run that failed: builders outlive whoever started them.
fn end_builders(folder: &Path) {
    for builder in faults::builders(folder) {
        let _ = rustix::process::kill_process(builder, rustix::process::Signal::KILL);
    }
}

/// What the build tool leaves mounted, its storage on itself, and what a run that failed left.
fn unmount(folder: &Path) {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let points = mounts.lines().filter_map(|line| line.split(' ').nth(4));
    for point in points.filter(|point| Path::new(point).starts_with(folder)) {
        let _ = std::process::Command::new("umount").args(["--lazy", point]).status();
    }
}
