//! What the services say to each other: subjects, questions and their answers, events, headers.
//!
//! A message type says its own subject and the type of its answer. How it travels is `bus`'s; what it means is its
//! service's. Values of `domain` travel in their one serialised form, the JSON of the events.

pub mod bucket;
pub mod cache_warmer;
pub mod error;
pub mod event;
pub mod header;
pub mod orchestrator;
pub mod question;
pub mod resolver;
pub mod schema;
pub mod secrets;
pub mod subject;
