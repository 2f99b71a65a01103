# The commands of the README. All of the work is in `cargo xtask`; this file only gets cargo going.

DEMO := target/demo-image

.PHONY: run build test check linker

# A command in a microVM, from an image made here: no registry, nothing installed by hand.
run: linker
	cargo xtask setup demo
	cargo xtask build
	cargo xtask demo-image $(DEMO)
	target/release/kiln run oci-layout:$(DEMO)

build: linker
	cargo xtask setup build
	cargo xtask build

# The gates, seconds of fuzzing, whole machines on this host's KVM, some of them as an ordinary user, and everything that touches
# KVM on the emulated hardware one.
test: linker
	cargo xtask setup
	cargo xtask check
	cargo xtask fuzz --seconds 5
	cargo xtask test
	cargo xtask test --user pools::a_machine ports:: files:: examples:: detached::a_vm
	cargo xtask test --rig --kvm

check: linker
	cargo xtask check

# cargo cannot build its first program without one.
linker:
	@command -v cc >/dev/null || { apt-get -qq update && apt-get -qq install -y --no-install-recommends gcc libc6-dev; }
