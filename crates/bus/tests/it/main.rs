//! The bus against a real nats-server, one node and three.

#![cfg(test)]

mod holders;
mod inspect;
mod journal;
mod keeper;
mod logs;
mod parts;
mod provision;
mod refs;
mod trouble;
mod versions;
mod view;
