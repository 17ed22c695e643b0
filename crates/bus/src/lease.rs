//! How long a lease lasts, and what follows from it.

use std::time::Duration;

/// The times of a lease. All follow from how long one lasts, so that nobody can choose a renewal that comes after the
/// lapse. Every process of an installation has the same: who takes over reckons with what the others do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lease {
    ttl: Duration,
}

impl Lease {
    /// In seconds. Shorter than this a busy machine's ordinary delays would end leases; longer, and a dead holder's builds
    /// wait for more than the 45 s after which they are promised to go on.
    pub const SECONDS: std::ops::RangeInclusive<u64> = 3..=30;

    /// A lease of so many seconds, as the server counts whole ones; those out of [`Lease::SECONDS`] are brought into it.
    pub fn of_seconds(seconds: u64) -> Self {
        Self { ttl: Duration::from_secs(seconds.clamp(*Self::SECONDS.start(), *Self::SECONDS.end())) }
    }

    /// When it lapses, unless it is renewed.
    pub(crate) fn ttl(self) -> Duration {
        self.ttl
    }

    /// Two renewals may fail before it lapses.
    pub(crate) fn renew_every(self) -> Duration {
        self.ttl / 3
    }

    /// Who could not renew for this long stops acting: well before anybody may take over.
    pub(crate) fn act_for(self) -> Duration {
        self.ttl * 2 / 3
    }

    /// Who was cut off, and is back, waits this long before it takes anything over: others were cut off too, and come back a
    /// moment later.
    pub(crate) fn settle(self) -> Duration {
        self.ttl / 2
    }
}

/// 30 s: renewed every 10 s, acted on for 20 s.
impl Default for Lease {
    fn default() -> Self {
        Self::of_seconds(30)
    }
}
