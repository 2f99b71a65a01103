//! Process 1 of a Kiln guest: carries out what the host asks for, and stands between it and the guest's processes.

pub mod power;
pub mod sys;
