//! The bus against a real nats-server, one node and three.

#![cfg(test)]

mod holders;
mod inspect;
mod journal;
mod logs;
mod parts;
mod trouble;
mod view;
