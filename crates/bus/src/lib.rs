//! Carries the contract over NATS: questions with deadlines, compare-and-set appends to the journal, leases, views,
//! logs, sealed secrets. It knows how a message travels, never what it means.
//!
//! *Invariants.* Every append of the journal names the image's whole subject tree as its expected-sequence filter. What
//! decides is read from the stream's leader; views and logs may read from any replica. One consumer a process and
//! stream, never one a build or a client.

pub mod ask;
pub mod connection;
pub mod error;
pub mod events;
pub mod holders;
pub mod inspect;
pub mod journal;
pub mod keeper;
pub mod layout;
mod lease;
pub mod logs;
pub mod refs;
pub mod revocations;
mod room;
pub mod seal;
pub mod secrets;
pub mod serve;
pub mod trace;
mod trouble;
pub mod view;

pub use connection::{Bus, Connect};
pub use error::BusError;
pub use lease::Lease;
pub use trouble::Troubles;
