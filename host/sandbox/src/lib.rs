//! Run OCI images as hardware-isolated microVMs.
