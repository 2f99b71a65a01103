//! The project's own build and check commands.

fn main() {}
