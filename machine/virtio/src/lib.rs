//! Virtio devices over MMIO for drivers that cannot be trusted.
