//! A machine made of a snapshot, and a snapshot made of a machine.

use std::fs::File;
use std::io;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use kiln_control::{Blame, SaveState};
use kiln_hypervisor::{Hypervisor, Kvm};
use kiln_snapshot::Header;
use kiln_support::digest::Digest;
use kiln_support::from_start::FromStart;
use kiln_virtio::VsockPorts;

use super::failure::Failure;
use super::plan::{Devices, RestorePlan};
use super::report::Reporter;
use crate::console::Console;
use crate::cpuid;
use crate::host;
use crate::paused::{MachineState, Parking, Paused, RestoreError};
use crate::shell::{Shape, Shell, ShellError};

/// The version a snapshot has to have: what is in a section changes with the monitor.
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// How long a guest may take to say that it knows who it is: microseconds, but for a host with too much to do. A guest that never does ends
/// the program, which could not be told to end.
const ANSWER_LIMIT: Duration = Duration::from_mins(1);

/// Makes the machine that `plan` has the snapshot of, of `shell` if there is one; it stands still.
///
/// The header alone decides whether this host can use the snapshot, before anything else of it is looked at; all of its state is
/// read and checked before there is a machine, and its memory is mapped and not read.
pub(super) fn restore(
    kvm: &Kvm,
    shell: Option<Shell<Kvm>>,
    plan: RestorePlan,
    reporter: &Arc<Reporter>,
) -> Result<(Paused<Kvm>, VsockPorts), Failure> {
    let RestorePlan { state, memory, devices, console, generation, stand } = plan;
    // The file is the host's too, and that of other machines it makes.
    let read = || io::BufReader::new(FromStart::of(&state));
    check_header(&kiln_snapshot::read_header(&mut read())?, kvm)?;
    let (header, sections) = kiln_snapshot::read(&mut read())?;
    let state = MachineState::from_sections(&sections)?;
    if shape_of(&header) != Some(state.shape) {
        return Err(Failure::new(Blame::Caller, "the snapshot's header is another machine's"));
    }

    super::confine(state.shape, devices.writable_bytes)?;
    let shell = match shell {
        Some(shell) if shell.shape() != state.shape => {
            return Err(RestoreError::Shape { expected: state.shape, found: shell.shape() }.into());
        }
        Some(shell) => shell,
        None => Shell::create(kvm, state.shape)?,
    };
    shell.memory().overlay(&memory).map_err(|error| match error.kind() {
        io::ErrorKind::InvalidData => {
            Failure::new(Blame::Caller, "the snapshot's memory is not as long as the machine's")
        }
        _ => Failure::host("cannot map the snapshot's memory", &error),
    })?;
    let console = Console::new(console).map_err(|error| Failure::host("cannot start the console", &error))?;
    let Devices { virtio, ports, .. } = devices;
    let observer = reporter.observer();
    let mut paused = Paused::restore(shell, &state, console, virtio, observer)?;
    reporter.watches(paused.memory());
    if stand {
        if paused.parking() == Parking::Doorbell {
            answering(|| paused.rehearse().map_err(Failure::from))?;
        }
        return Ok((paused, ports));
    }
    // Who is parked at its port is told there, by the host.
    if let Some(generation) = generation.filter(|_| paused.parking() != Parking::Port) {
        reporter.expect(paused.put_mail(&generation)?);
    }
    Ok((paused, ports))
}

/// Has a guest answer on this thread, which hears nobody until it has.
///
/// # Errors
/// The guest's, or the system's that has no timer.
pub(super) fn answering<T, E: From<io::Error>>(answer: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
    kiln_jail::deadline(Some(ANSWER_LIMIT))?;
    let answered = answer();
    kiln_jail::deadline(None)?;
    answered
}

/// Writes the state of a machine to `file`.
pub(super) fn save_state(
    kvm: &Kvm,
    state: &MachineState,
    order: &SaveState,
    mut file: &File,
) -> Result<(), Failure> {
    let header = Header {
        memory_bytes: state.shape.memory_bytes(),
        vcpus: state.shape.vcpus().into(),
        vmm: VERSION.into(),
        cpu: class(kvm)?,
        kernel: digest(&order.kernel)?,
        initramfs: digest(&order.initramfs)?,
        memory: digest(&order.memory)?,
    };
    kiln_snapshot::write(&header, &state.to_sections(), &mut file)
        .map_err(|error| Failure::host("cannot write the snapshot", &error))
}

/// Refuses a snapshot that is not for this monitor on this host.
fn check_header(header: &Header, kvm: &Kvm) -> Result<(), Failure> {
    if header.vmm != VERSION {
        let message = format!("the snapshot was made by Kiln {}; this is Kiln {VERSION}", header.vmm);
        return Err(Failure::new(Blame::Caller, message).with_hint("bake the image again"));
    }
    if header.cpu != class(kvm)? {
        let message = "the snapshot was made on a host with another kind of processor or KVM";
        return Err(Failure::new(Blame::Caller, message).with_hint("bake the image again on this host"));
    }
    if shape_of(header).is_none() {
        return Err(Failure::new(Blame::Caller, "the snapshot's machine is of an impossible size"));
    }
    Ok(())
}

fn shape_of(header: &Header) -> Option<Shape> {
    let mib = u32::try_from(header.memory_bytes >> 20).ok()?;
    Shape::new(mib, header.vcpus).ok().filter(|_| header.memory_bytes.is_multiple_of(1 << 20))
}

/// What a snapshot's host has to have in common with this one. Found once.
pub(super) fn class(kvm: &Kvm) -> Result<Digest, Failure> {
    static CLASS: OnceLock<Digest> = OnceLock::new();
    if let Some(class) = CLASS.get() {
        return Ok(*class);
    }
    let supported = kvm.supported_cpuid().map_err(ShellError::from)?;
    Ok(*CLASS.get_or_init(|| cpuid::class(&supported, host::is_pvm())))
}

fn digest(bytes: &[u8]) -> Result<Digest, Failure> {
    let bytes = bytes.try_into();
    bytes.map(Digest::from_bytes).map_err(|_| Failure::new(Blame::Kiln, "a digest that is none"))
}
