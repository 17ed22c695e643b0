//! The gateway against a real nats-server; orchestrator and resolver are played by the test.

#![cfg(test)]

mod bus_away;
mod desk;
