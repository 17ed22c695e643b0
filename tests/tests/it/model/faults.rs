//! What may go wrong, and how often: the model's bounds.

/// A thing that goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Fault {
    /// A holder dies and comes back.
    Crash,
    /// A holder sleeps past its lease.
    Lapse,
    /// A holder is asked to end (no fault, but bounded as one).
    Release,
    /// An append's acknowledgement, or that of a PUT, is lost.
    LostAck,
    /// A builder dies.
    BuilderDeath,
    /// A builder process that has yet to begin is taken for lost.
    Overlooked,
    /// A holder can't go on before the start: no time is left in the queue, or the engine refuses.
    GivingUp,
    /// What a run left is lost before the build's end (but not its revocation).
    Removal,
}

/// All that a holder, a builder and the bus may do wrong.
pub(super) const COMMON: &[Fault] = &[
    Fault::Crash,
    Fault::Lapse,
    Fault::Release,
    Fault::LostAck,
    Fault::BuilderDeath,
    Fault::Overlooked,
    Fault::GivingUp,
];

/// Which may happen, and how many of them in all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Faults {
    pub(super) kinds: &'static [Fault],
    pub(super) left: u8,
}

impl Faults {
    /// Counts one; none where it may not happen.
    pub(super) fn suffer(&mut self, fault: Fault) -> Option<()> {
        if !self.kinds.contains(&fault) {
            return None;
        }
        self.left = self.left.checked_sub(1)?;
        Some(())
    }
}
