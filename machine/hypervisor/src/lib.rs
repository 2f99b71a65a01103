//! One virtual machine and its vCPUs behind small traits, with a KVM and a scripted backend.
