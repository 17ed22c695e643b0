//! What befalls the processes, and how it is made good again.

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result};
use kiln_contract::subject;
use kiln_testkit::nats;
use kiln_testkit::wire::Wire;
use rustix::process::{Pid, Signal, kill_process};
use tokio::sync::watch;
use tokio::time::sleep;

use super::plan::{Fault, Planned};
use super::verdict::Problem;
use super::world::{Role, World};

/// How many faults may be there at once.
pub(super) const HANDS: usize = 2;
/// How long a fault waits for somebody to befall: builders come and go.
const VICTIM: Duration = Duration::from_secs(20);
/// Between the end of a fault and the next one by the same hand.
const REST: Duration = Duration::from_millis(300);
/// How long a role may take to end on SIGTERM.
const TERMINATION: Duration = Duration::from_secs(30);

/// What holds no truth of its own: leases, what registries answered, steps that run, the copy for other subscribers.
const DELETABLE: [&str; 4] =
    ["KV_KILN_HOLDERS", "KV_KILN_REFS", subject::PROGRESS_STREAM, subject::EVENTS_STREAM];

/// What was done.
#[derive(Default)]
pub(super) struct Done {
    pub(super) faults: AtomicUsize,
    /// Faults that found nobody to befall.
    missed: AtomicUsize,
    pub(super) registry: AtomicUsize,
    pub(super) builders: AtomicUsize,
}

impl Done {
    /// A run in which little happened shows little: most of what was planned must have come to pass.
    pub(super) fn too_little(&self, planned: usize) -> Option<Problem> {
        let faults = Self::count(&self.faults);
        (faults * 5 < planned * 4).then(|| Problem::new(format!("{faults} of {planned} faults came to pass")))
    }

    pub(super) fn count(counter: &AtomicUsize) -> usize {
        counter.load(Ordering::Relaxed)
    }
}

impl std::fmt::Display for Done {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let count = |counter| Self::count(counter);
        write!(
            f,
            "{} faults ({} of builders, {} of the registry; {} more found nobody)",
            count(&self.faults),
            count(&self.builders),
            count(&self.registry),
            count(&self.missed)
        )
    }
}

/// Brings the planned faults about, spread over the builds: the first of `n` when the first of `builds` has begun, the last when
/// the last has. Each is undone before it returns.
pub(super) async fn befall(
    world: &World,
    faults: &[Planned],
    builds: usize,
    begun: watch::Receiver<usize>,
    done: &Done,
) {
    let next = AtomicUsize::new(0);
    let hand = || async {
        let mut begun = begun.clone();
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            let Some(planned) = faults.get(number) else { return };
            let due = number * builds / faults.len();
            // The sender goes with the builds.
            if begun.wait_for(|begun| *begun > due).await.is_err() {
                return;
            }
            match world.suffer(*planned, done).await {
                Ok(()) => done.faults.fetch_add(1, Ordering::Relaxed),
                Err(error) => {
                    eprintln!("chaos: no {:?}: {error:#}", planned.fault);
                    done.missed.fetch_add(1, Ordering::Relaxed)
                }
            };
            sleep(REST).await;
        }
    };
    futures::future::join_all((0..HANDS).map(|_| hand())).await;
}

impl World {
    async fn suffer(&self, Planned { fault, lasts }: Planned, done: &Done) -> Result<()> {
        let role = |number: usize| &self.roles[number % self.roles.len()];
        // Who holds a role's process may wait for these to be over; so nobody waits for a process with it in hand.
        let _on_the_bus = if fault.is_of_the_bus() { Some(self.bus_faults.read().await) } else { None };
        match fault {
            Fault::KillRole(number) => {
                let mut process = role(number).process.lock().await;
                process.kill().await?;
                sleep(lasts).await;
                process.start()
            }
            Fault::TerminateRole(number) => {
                let mut process = role(number).process.lock().await;
                if process.terminate(TERMINATION).await.is_err() {
                    // It may be the bus that hinders it; so it has the same time once more with the bus left alone.
                    let calm = self.bus_faults.write().await;
                    if let Err(error) = process.wait(TERMINATION).await {
                        let problem = format!("{error:#}, the bus being well for {TERMINATION:?}");
                        self.fallen.lock().expect("nobody panics with it").push(problem);
                        process.kill().await?;
                    }
                    drop(calm);
                }
                sleep(lasts).await;
                process.start()
            }
            Fault::PauseRole(number) => {
                let process = role(number).process.lock().await;
                process.pause()?;
                sleep(lasts).await;
                process.resume()
            }
            Fault::CutBus(number) => {
                broken(&role(number).bus, lasts, Wire::cut).await;
                Ok(())
            }
            Fault::LoseBusAnswers(number) => {
                broken(&role(number).bus, lasts, Wire::lose_answers).await;
                Ok(())
            }
            Fault::FreezeBus(number) => {
                broken(&role(number).bus, lasts, Wire::freeze).await;
                Ok(())
            }
            Fault::CutCallers(number) => {
                let gateways: Vec<&Role> = self.roles.iter().filter(|role| role.callers.is_some()).collect();
                let wire = gateways[number % gateways.len()].callers.as_ref();
                broken(wire, lasts, Wire::cut).await;
                Ok(())
            }
            Fault::KillNode(number) => self.kill_node(number % self.nodes.len(), lasts).await,
            Fault::KillLeader => self.kill_node(self.leader().await?, lasts).await,
            Fault::TerminateNode(number) => {
                let mut node = self.nodes[number % self.nodes.len()].lock().await;
                node.stop()?;
                sleep(lasts).await;
                node.start_again().await
            }
            Fault::PauseNode(number) => self.pause_node(number % self.nodes.len(), lasts).await,
            Fault::PauseLeader => self.pause_node(self.leader().await?, lasts).await,
            Fault::PauseRegistry => {
                done.registry.fetch_add(1, Ordering::Relaxed);
                self.workshop.registry.pause()?;
                sleep(lasts).await;
                self.workshop.registry.resume()
            }
            Fault::CutRegistry => {
                done.registry.fetch_add(1, Ordering::Relaxed);
                broken([&self.registry_wire], lasts, Wire::cut).await;
                Ok(())
            }
            Fault::KillBuilder(number) => self.signal_builder(number, Signal::KILL, done).await,
            Fault::TerminateBuilder(number) => self.signal_builder(number, Signal::TERM, done).await,
            Fault::PauseBuilder(number) => {
                let builder = self.builder(number).await?;
                send(builder, Signal::STOP);
                sleep(lasts).await;
                send(builder, Signal::CONT);
                Ok(())
            }
            Fault::DeleteStream(number) => {
                let stream = &DELETABLE[number % DELETABLE.len()];
                nats::delete_stream(self.nodes_url(), stream).await
            }
        }
    }

    async fn kill_node(&self, number: usize, lasts: Duration) -> Result<()> {
        let mut node = self.nodes[number].lock().await;
        node.kill();
        sleep(lasts).await;
        node.start_again().await
    }

    async fn pause_node(&self, number: usize, lasts: Duration) -> Result<()> {
        let node = self.nodes[number].lock().await;
        node.pause()?;
        sleep(lasts).await;
        node.resume()
    }

    /// The node that leads the journal, as soon as one does.
    async fn leader(&self) -> Result<usize> {
        let leader = async {
            loop {
                if let Ok(name) = nats::leader_of(self.nodes_url(), subject::JOURNAL_STREAM).await {
                    return name;
                }
                sleep(Duration::from_millis(200)).await;
            }
        };
        let leader = tokio::time::timeout(VICTIM, leader).await.context("the journal has no leader")?;
        // Nodes are named in their order.
        let number = leader.rsplit('-').next().and_then(|number| number.parse().ok());
        number.with_context(|| format!("no node `{leader}`"))
    }

    async fn signal_builder(&self, number: usize, signal: Signal, done: &Done) -> Result<()> {
        send(self.builder(number).await?, signal);
        done.builders.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// One of the builders that live, as soon as there is one.
    async fn builder(&self, number: usize) -> Result<Pid> {
        let runs = self.runs();
        let found = async {
            loop {
                let builders = builders(&runs);
                if let Some(builder) = builders.get(number % builders.len().max(1)) {
                    return *builder;
                }
                sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(VICTIM, found).await.context("no builder lives")
    }
}

/// Wires broken for a while.
async fn broken<'a>(
    wires: impl IntoIterator<Item = &'a Wire> + Clone,
    lasts: Duration,
    break_one: impl Fn(&Wire),
) {
    wires.clone().into_iter().for_each(break_one);
    sleep(lasts).await;
    wires.into_iter().for_each(Wire::restore);
}

/// The builders' own processes, not their children.
pub(super) fn builders(runs: &Path) -> Vec<Pid> {
    let of_ours = |pid: i32| {
        let arguments = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let mut arguments = arguments.split('\0').skip(1);
        arguments.next() == Some("builder")
            && arguments.next() == Some("--run-dir")
            && arguments.next().is_some_and(|run| Path::new(run).starts_with(runs))
            && leads_a_session(pid)
    };
    let pids = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let mut pids: Vec<i32> = pids.filter(|pid| of_ours(*pid)).collect();
    pids.sort_unstable();
    pids.into_iter().filter_map(Pid::from_raw).collect()
}

/// A builder does; a child that it has just forked looks like it otherwise.
fn leads_a_session(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // proc(5): behind the name come state, parent, process group, session.
    let session = stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(3));
    session.and_then(|session| session.parse().ok()) == Some(pid)
}

/// The builder may have ended meanwhile.
fn send(pid: Pid, signal: Signal) {
    let _ = kill_process(pid, signal);
}
