//! Registries, images, guest driver halves and other things tests need.
