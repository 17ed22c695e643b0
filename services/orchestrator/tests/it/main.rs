//! The orchestrator on a real bus, with an engine and a resolver that the tests play.

#![cfg(test)]

mod cancel;
mod cleanup;
mod lifecycle;
mod one_time;
mod single_flight;
mod stage;
mod starting;
mod stopping;
mod take_over;
mod volume;
