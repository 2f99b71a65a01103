//! Benchmarks a user can run.

fn main() {}
