//! The content-addressed store on disk, shared by processes and safe against crashes.
