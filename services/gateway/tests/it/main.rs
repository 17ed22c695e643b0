//! The gateway against a real nats-server. Orchestrator and resolver are played by the test, or it writes logs and records
//! itself.

#![cfg(test)]

mod bed;
mod bus_away;
mod compat;
mod desk;
mod grpc_log;
mod http_log;
mod resolved;
mod steps;
