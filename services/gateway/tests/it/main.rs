//! The gateway against a real nats-server, whose logs and records the test writes.

mod bed;
mod http_log;
mod steps;
