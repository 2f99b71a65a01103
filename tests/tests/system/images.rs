//! Pulling from registries, and what is then in the store.
