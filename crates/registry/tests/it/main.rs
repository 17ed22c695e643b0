//! kiln-registry against a real docker-registry, and against fronts that misbehave on demand.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "clippy takes only the tests themselves for tests, not what they share"
)]

mod copy;
mod credentials;
mod fault_table;
mod faults;
mod inspect;
mod resolve;
mod tags;
mod tokens;
mod trust;

use std::time::Duration;

use kiln_domain::platform::Platform;
use kiln_registry::{Access, OciRegistry};

/// Long enough for whatever should happen on a busy machine.
const LONG: Duration = Duration::from_secs(60);

fn client() -> OciRegistry {
    kiln_registry::install_crypto_provider();
    OciRegistry::default()
}

/// No credentials, and no patience for what may pass.
fn at_once() -> Access {
    let mut access = Access::anonymous(LONG);
    access.patience = Duration::ZERO;
    access
}

fn amd64() -> Platform {
    Platform::default()
}
