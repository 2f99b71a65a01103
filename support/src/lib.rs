//! Code that has never heard of virtual machines: digests, durable files, framing.
