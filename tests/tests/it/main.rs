//! Tests of the whole: the house rules, the model, the schemas, and builds from end to end.

#![cfg(test)]

mod chaos;
mod drop_in;
mod house_rules;
mod model;
mod schemas;
mod system;
