//! Runs, their builder processes, and the registry that these push to.

use super::journal::{BEFORE, Image};
use super::rules::Rules;

/// What there is of one attempt: the run's folder, and the processes that were started for it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Run {
    /// The folder has a spec; absent before the start and after the removal.
    pub(super) spec: bool,
    /// Outlives the removal.
    pub(super) revoked: bool,
    pub(super) outcome: Option<Outcome>,
    /// The digest that a builder wrote down before it PUT the tag.
    pub(super) recorded: Option<Image>,
    /// The engine was asked to end it.
    pub(super) killed: bool,
    /// Processes that were started and don't have the lock yet.
    pub(super) waiting: u8,
    /// Processes that have had the lock.
    pub(super) begun: u8,
    /// Who has the lock now.
    pub(super) builder: Option<Builder>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Outcome {
    Pushed(Image),
    /// The user's Dockerfile, or a push that seemed to fail.
    Failed,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Builder {
    pub(super) image: Image,
    pub(super) stage: Stage,
}

/// A builder's life; it may sleep, or die, between any two of these.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Stage {
    /// Has the lock, has looked at nothing.
    Locked,
    /// Fetches, builds, pushes to the base ref.
    Building,
    /// Has looked for `revoked` again, and recorded the digest.
    Recorded,
    /// The PUT of the target's tag is sent.
    Putting,
}

/// What the engine says of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Observed {
    Absent,
    Running,
    Ended,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Registry {
    pub(super) tag: Image,
    /// A PUT of the tag that is sent and not yet applied.
    pub(super) in_flight: Option<Image>,
    /// A PUT of this build was applied.
    pub(super) pushed: bool,
}

impl Registry {
    pub(super) fn new() -> Self {
        Self { tag: BEFORE, in_flight: None, pushed: false }
    }

    /// The PUT is applied.
    pub(super) fn land(&mut self) -> Option<()> {
        self.tag = self.in_flight.take()?;
        self.pushed = true;
        Some(())
    }
}

impl Run {
    /// Idempotent by the run's id; whether a process was started before can be seen only by its lock or its outcome.
    pub(super) fn start(&mut self) -> Result<(), Revoked> {
        if self.revoked {
            return Err(Revoked);
        }
        self.spec = true;
        if self.builder.is_none() && self.outcome.is_none() && self.waiting + self.begun < 2 {
            self.waiting += 1;
        }
        Ok(())
    }

    /// `overlook`: a process that has not begun is not seen.
    pub(super) fn observe(&self, overlook: bool) -> Observed {
        match self {
            Self { builder: Some(_), .. } => Observed::Running,
            Self { spec: false, .. } => Observed::Absent,
            Self { waiting: 1.., .. } if !overlook => Observed::Running,
            _ => Observed::Ended,
        }
    }

    /// Removes all but the revocation.
    pub(super) fn remove(&mut self) {
        (self.spec, self.outcome, self.recorded) = (false, None, None);
    }

    /// A process that was started gets the lock. Its image is its own, or (`number` is none) that which was there before.
    pub(super) fn begin(&mut self, number: Option<u8>) -> Option<()> {
        if self.builder.is_some() || self.waiting == 0 {
            return None;
        }
        self.waiting -= 1;
        self.begun += 1;
        let image = number.map_or(BEFORE, |number| number * 10 + self.begun);
        self.builder = Some(Builder { image, stage: Stage::Locked });
        Some(())
    }

    /// The builder's next step, where nothing goes wrong.
    pub(super) fn proceed(&mut self, rules: &Rules, registry: &mut Registry) -> Option<()> {
        let Builder { image, stage } = self.builder.clone()?;
        let revoked = self.revoked && rules.revoked_check;
        let next = match stage {
            Stage::Locked => {
                let pushed_before = self.recorded.is_some() && rules.recorded_run_is_over;
                let go_on = self.spec && self.outcome.is_none() && !pushed_before && !revoked;
                go_on.then_some(Stage::Building)
            }
            Stage::Building if revoked && rules.revoked_check_before_push => None,
            Stage::Building => {
                if rules.recorded_digest {
                    self.recorded = Some(image);
                }
                Some(Stage::Recorded)
            }
            Stage::Recorded => {
                registry.in_flight = Some(image);
                Some(Stage::Putting)
            }
            Stage::Putting if registry.in_flight.is_some() => return None,
            Stage::Putting => {
                self.outcome = Some(Outcome::Pushed(image));
                None
            }
        };
        self.builder = next.map(|stage| Builder { image, stage });
        Some(())
    }

    /// The build fails by the user's doing, or (`push_too`) the PUT's answer is lost.
    pub(super) fn fail(&mut self, push_too: bool) -> Option<()> {
        let at = if push_too { Stage::Putting } else { Stage::Building };
        self.builder.take_if(|builder| builder.stage == at)?;
        self.outcome = Some(Outcome::Failed);
        Some(())
    }

    /// The builder dies; a PUT that it sent goes on without it.
    pub(super) fn die(&mut self) -> Option<()> {
        self.builder.take().map(drop)
    }

    /// Past its first look, a builder is at work: it pushes to the base ref, and comes to push the target.
    pub(super) fn is_at_work(&self) -> bool {
        self.builder.as_ref().is_some_and(|builder| builder.stage >= Stage::Building)
    }
}

#[derive(Debug, PartialEq, Eq)]
pub(super) struct Revoked;
