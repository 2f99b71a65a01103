//! The monitor of one virtual machine: boot, devices, exit loop.
