//! Process 1 of a Kiln guest.

fn main() {}
