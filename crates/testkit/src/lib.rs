//! What tests are made with: a real nats-server and a real registry per test, a wire that can be cut, and fakes for
//! ports.

pub mod authority;
pub mod bare;
pub mod builders;
pub mod engine;
pub mod engine_conformance;
pub mod fleet;
pub mod front;
pub mod installation;
pub mod nats;
pub mod noop_engine;
pub mod process;
pub mod proxy;
pub mod records;
pub mod registry;
pub mod streams;
pub mod supervisor;
pub mod wire;
pub mod workshop;
pub mod ws_manager;
