//! What a run is to do, made of its seed alone: the builds, who cancels them when, and the faults. A seed replays the plan;
//! how the processes interleave remains the machine's affair.

use std::time::Duration;

/// How much of it all.
#[derive(Clone, Copy, Debug)]
pub(super) struct Size {
    pub(super) builds: usize,
    pub(super) faults: usize,
    /// Of a hundred images, so many are built by the real build tool.
    pub(super) real_percent: u64,
}

#[derive(Debug)]
pub(super) struct Plan {
    pub(super) images: Vec<Image>,
    pub(super) builds: Vec<Request>,
    pub(super) faults: Vec<Planned>,
}

/// What an image is made by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Good,
    /// Its last step ends with exit code 3.
    Failing,
    /// It takes some seconds.
    Long,
    /// By a build tool that is played, and costs next to nothing: the same image each time.
    Same,
    /// Played too, another image each time.
    Fresh,
}

impl Kind {
    pub(super) fn is_played(self) -> bool {
        matches!(self, Self::Same | Self::Fresh)
    }
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Image {
    pub(super) kind: Kind,
    /// What its step prints.
    pub(super) lines: u64,
}

/// A request for a build.
#[derive(Clone, Debug)]
pub(super) struct Request {
    /// Its place among the images.
    pub(super) image: usize,
    pub(super) owner: String,
    pub(super) force: bool,
    pub(super) cancel: Option<Cancel>,
    pub(super) followers: u64,
    /// The gateway that is asked first.
    pub(super) gateway: usize,
}

/// When a caller asks that its build stop.
#[derive(Clone, Copy, Debug)]
pub(super) enum Cancel {
    AtOnce,
    WhenRunning,
    /// So long after it was seen to run.
    Into(Duration),
    /// Once its log says that the image is pushed, or copied to the target.
    AtPush,
    AtCopy,
}

/// A fault, and for how long.
#[derive(Clone, Copy, Debug)]
pub(super) struct Planned {
    pub(super) fault: Fault,
    pub(super) lasts: Duration,
}

/// A number in a fault picks one among those that are there at the time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    KillRole(usize),
    TerminateRole(usize),
    PauseRole(usize),
    CutBus(usize),
    LoseBusAnswers(usize),
    FreezeBus(usize),
    CutCallers(usize),
    KillNode(usize),
    TerminateNode(usize),
    PauseNode(usize),
    /// The node that leads the journal.
    KillLeader,
    PauseLeader,
    PauseRegistry,
    CutRegistry,
    KillBuilder(usize),
    TerminateBuilder(usize),
    PauseBuilder(usize),
    /// One of the streams without which nothing is lost goes, as by somebody's hand.
    DeleteStream(usize),
}

impl Fault {
    /// Whether it keeps a role from the journal, its process being well.
    pub(super) fn is_of_the_bus(self) -> bool {
        matches!(
            self,
            Self::CutBus(_)
                | Self::LoseBusAnswers(_)
                | Self::FreezeBus(_)
                | Self::KillNode(_)
                | Self::TerminateNode(_)
                | Self::PauseNode(_)
                | Self::KillLeader
                | Self::PauseLeader
                | Self::DeleteStream(_)
        )
    }
}

const OWNERS: [&str; 5] = ["ann", "ben", "cem", "dia", "eve"];

impl Plan {
    pub(super) fn new(seed: u64, size: Size) -> Self {
        let mut dice = Dice(seed);
        let (mut images, mut builds) = (Vec::new(), Vec::new());
        while builds.len() < size.builds {
            // Images are asked for again by others, soon (then they join, or find it built) or later.
            let again = !images.is_empty() && dice.percent(35);
            let image = if again {
                let back = dice.below(4.min(images.len() as u64)) as usize;
                images.len() - 1 - back
            } else {
                let lines = 1 + dice.below(40) * dice.below(40);
                images.push(Image { kind: dice.kind(size.real_percent), lines });
                images.len() - 1
            };
            builds.push(Request {
                image,
                owner: OWNERS[dice.below(5) as usize].to_owned(),
                force: again && dice.percent(60),
                cancel: dice.percent(25).then(|| dice.cancel()),
                followers: 1 + dice.below(2),
                gateway: dice.below(2) as usize,
            });
        }
        let faults = (0..size.faults).map(|_| dice.planned()).collect();
        Self { images, builds, faults }
    }
}

/// Random numbers that stay the same for a seed, whatever becomes of any library (splitmix64).
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    fn percent(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    fn between(&mut self, least_ms: u64, most_ms: u64) -> Duration {
        Duration::from_millis(least_ms + self.below(most_ms - least_ms))
    }

    fn kind(&mut self, real_percent: u64) -> Kind {
        if self.percent(real_percent) {
            [Kind::Good, Kind::Good, Kind::Failing, Kind::Long][self.below(4) as usize]
        } else {
            [Kind::Same, Kind::Fresh][self.below(2) as usize]
        }
    }

    fn cancel(&mut self) -> Cancel {
        match self.below(6) {
            0 => Cancel::AtOnce,
            1 => Cancel::WhenRunning,
            2 | 3 => Cancel::Into(self.between(50, 3_000)),
            4 => Cancel::AtPush,
            _ => Cancel::AtCopy,
        }
    }

    fn planned(&mut self) -> Planned {
        let number = self.next() as usize;
        let fault = match self.below(34) {
            0..=6 => Fault::KillRole(number),
            7..=9 => Fault::TerminateRole(number),
            10..=13 => Fault::PauseRole(number),
            14 | 15 => Fault::CutBus(number),
            16 => [Fault::LoseBusAnswers(number), Fault::FreezeBus(number)][self.below(2) as usize],
            17 => Fault::CutCallers(number),
            18 | 19 => Fault::KillNode(number),
            20 => Fault::TerminateNode(number),
            21 => Fault::PauseNode(number),
            22 | 23 => Fault::KillLeader,
            24 => Fault::PauseLeader,
            25 => Fault::PauseRegistry,
            26 => Fault::CutRegistry,
            27..=29 => Fault::KillBuilder(number),
            30 => Fault::TerminateBuilder(number),
            31 | 32 => Fault::DeleteStream(number),
            _ => Fault::PauseBuilder(number),
        };
        let lasts = match fault {
            // Some last longer than the registry is given, after a builder's end, to show what was under way.
            Fault::PauseRegistry | Fault::CutRegistry if self.percent(40) => self.between(3_000, 6_000),
            Fault::PauseRegistry | Fault::CutRegistry => self.between(100, 1_500),
            // Some last longer than a lease.
            Fault::PauseRole(_) | Fault::CutBus(_) | Fault::LoseBusAnswers(_) | Fault::FreezeBus(_)
                if self.percent(30) =>
            {
                self.between(5_000, 12_000)
            }
            _ => self.between(100, 4_000),
        };
        Planned { fault, lasts }
    }
}

#[test]
fn a_seed_replays_the_plan() {
    let size = Size { builds: 300, faults: 200, real_percent: 20 };
    let plan = |seed| format!("{:?}", Plan::new(seed, size));
    assert_eq!(plan(7), plan(7));
    assert_ne!(plan(7), plan(8));
    let Plan { images, builds, faults } = Plan::new(1, size);
    assert!(images.len() < builds.len() && builds.iter().any(|build| build.force));
    assert!(faults.iter().any(|planned| planned.fault == Fault::KillLeader));
    let of_the_registry =
        |planned: &&Planned| matches!(planned.fault, Fault::PauseRegistry | Fault::CutRegistry);
    let lasting: Vec<_> =
        faults.iter().filter(of_the_registry).map(|planned| planned.lasts.as_secs()).collect();
    assert!(lasting.iter().any(|lasts| *lasts < 2) && lasting.iter().any(|lasts| *lasts >= 3), "{lasting:?}");
    for kind in [Kind::Good, Kind::Failing, Kind::Long, Kind::Same, Kind::Fresh] {
        assert!(images.iter().any(|image| image.kind == kind), "{kind:?}");
    }
}
