//! From layer tar streams to EROFS images and merged root file systems.
