//! The words and the rules of Kiln: what an image is called, what a build is, which change of it is legal,
//! what a builder is given and what it answers, and the port through which builders are run.
//!
//! Everything here is pure: no I/O, no clock, no environment, no randomness. Time and entropy are parameters.

pub mod engine;
pub mod failure;
pub mod finding;
pub mod hash;
pub mod id;
pub mod layer_cache;
pub mod limits;
pub mod mask;
pub mod platform;
pub mod queue;
pub mod rank;
pub mod record;
pub mod reference;
pub mod registries;
pub mod run;
pub mod run_folder;
pub mod source;
pub mod step;
pub mod transition;
mod wait;
