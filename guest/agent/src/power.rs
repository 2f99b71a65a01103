//! What the agent tells the monitor without words: that it runs, that it listens, that it is parked, that the machine is
//! to end.

use kiln_protocol::{READY_PORT, mailbox, power};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use rustix::system::RebootCommand;

use crate::sys::{self, Mail, Mailbox, PowerPage};

/// The way to the monitor that needs no guest kernel; without the device, a machine still works, parks at its port, and ends
/// by a reset.
pub struct Power {
    bell: Bell,
    mailbox: Option<Mailbox>,
}

/// What a store to a register is.
enum Bell {
    /// There is no device.
    Missing,
    Page(PowerPage),
    /// A Unix socket: the agent as an ordinary program, for tests on a host. A store is the register and the value,
    /// 32 bits each, and done when a byte comes back.
    Socket(OwnedFd),
}

/// What a parked guest is given to become another.
pub(crate) struct Taken {
    /// The mail.
    pub(crate) mail: Mail,
    /// The processor's counter when the guest went on.
    pub(crate) ticks: u64,
}

impl Power {
    /// Finds the power device and the mailbox, and says why when there is none.
    pub fn find() -> (Self, Option<Errno>) {
        match PowerPage::map() {
            Ok(page) => match Mailbox::map() {
                Ok(mailbox) => (Self { bell: Bell::Page(page), mailbox: Some(mailbox) }, None),
                Err(error) => (Self { bell: Bell::Page(page), mailbox: None }, Some(error)),
            },
            Err(error) => (Self::none(), Some(error)),
        }
    }

    /// No power device.
    pub fn none() -> Self {
        Self { bell: Bell::Missing, mailbox: None }
    }

    /// A socket in place of the device: for tests on a host.
    pub fn on_socket(socket: OwnedFd, mailbox: Mailbox) -> Self {
        Self { bell: Bell::Socket(socket), mailbox: Some(mailbox) }
    }

    /// Whether the guest parks at the doorbell and looks for mail. Otherwise it waits at its port.
    pub(crate) fn has_doorbell(&self) -> bool {
        self.mailbox.is_some()
    }

    /// Says that the agent listens, before any process of a user's runs.
    pub fn announce(&self) {
        match self.bell {
            Bell::Missing => sys::knock(READY_PORT),
            Bell::Page(_) | Bell::Socket(_) => self.ring(power::PHASE_LISTENING),
        }
    }

    /// Parks; the machine stands still in here, for as long as the monitor likes, and is saved here. Returns whether
    /// there was mail when it went on: then it has been taken, and acknowledged. Without it, the machine is the one it
    /// was.
    ///
    /// These are a restored guest's first instructions, and each page they touch costs its caller time. So from one
    /// ring to the other there is no system call and no allocation, and no memory but `taken`, the stack and the
    /// mailbox.
    #[inline(never)]
    pub(crate) fn park(&self, taken: &mut Taken) -> bool {
        let Some(mailbox) = &self.mailbox else { return false };
        loop {
            self.ring(power::PHASE_PARKED);
            taken.ticks = sys::ticks();
            if !mailbox.take(&mut taken.mail) {
                return false;
            }
            if !is_rehearsal(&taken.mail) {
                self.ring(power::PHASE_RESUMED);
                return true;
            }
        }
    }

    /// Rings the doorbell with a phase of [`power`].
    #[inline]
    pub fn ring(&self, phase: u32) {
        self.write(power::DOORBELL, phase);
    }

    /// Ends the machine. Returns when that cannot be done.
    pub fn off(&self) {
        self.write(power::OFF, 0);
        if matches!(self.bell, Bell::Socket(_)) {
            return;
        }
        // Still here: there is no device. The kernel's reset is a triple fault in the end, which every monitor sees.
        let _ = rustix::system::reboot(RebootCommand::Restart);
    }

    #[inline]
    fn write(&self, register: usize, value: u32) {
        match &self.bell {
            Bell::Page(page) => page.write(register, value),
            Bell::Missing => {}
            Bell::Socket(socket) => store(socket, register, value),
        }
    }
}

/// Whether the mail is one to be acknowledged by parking again.
#[inline]
fn is_rehearsal(mail: &Mail) -> bool {
    mail[mailbox::REHEARSAL_AT..][..4] != [0; 4]
}

#[cold]
#[inline(never)]
fn store(socket: &OwnedFd, register: usize, value: u32) {
    let store = (register as u64 | u64::from(value) << 32).to_le_bytes();
    // Whoever is there no more lets nobody wait.
    let _ = rustix::net::send(socket, &store, SendFlags::NOSIGNAL);
    let _ = rustix::net::recv(socket, &mut [0_u8], RecvFlags::empty());
}
