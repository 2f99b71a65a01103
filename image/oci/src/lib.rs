//! Images from registries, OCI layouts and archives into the store.
