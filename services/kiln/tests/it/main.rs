//! The `kiln` binary as others see it: its command line, and its processes.

mod cli;
#[cfg(test)]
mod configuration;
#[cfg(test)]
mod doctor;
#[cfg(test)]
mod roles;
#[cfg(test)]
mod running;
#[cfg(test)]
mod subscriber;
#[cfg(test)]
mod supervise;
#[cfg(test)]
mod up;
