//! The resolver as others meet it: over a real bus, before real registries and real git remotes.

#![cfg(test)]

mod commits;
mod credentials;
mod front;
mod http_git;
mod images;
mod mirrors;
mod replicas;
mod rig;
mod trouble;
