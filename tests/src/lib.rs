//! Nothing: this crate is its tests (`tests/it`) and benchmarks (`benches`), which look at all the others from outside.
