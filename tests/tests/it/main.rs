//! Tests of the whole: the house rules, the model, the schemas, and builds from end to end.

#![cfg(test)]

mod chaos;
mod house_rules;
mod model;
mod schemas;
mod system;
