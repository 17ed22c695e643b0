//! What every process needs, whatever its duty: configuration, telemetry, health, shutdown. It knows no service's
//! name; the caller brings the configuration's type, the names of readiness checks, the listeners and the token.

pub mod config;
pub mod health;
pub mod shutdown;
pub mod telemetry;
