//! What the agent tells the monitor without words: that it runs, that it listens, that the machine is to end.

use kiln_protocol::power;
use rustix::io::Errno;
use rustix::system::RebootCommand;

use crate::sys::PowerPage;

/// The way to the monitor that needs no guest kernel; without the device, a machine still works and ends by a reset.
pub struct Power {
    page: Option<PowerPage>,
}

impl Power {
    /// Finds the power device, and says why when there is none.
    pub fn find() -> (Self, Option<Errno>) {
        match PowerPage::map() {
            Ok(page) => (Self { page: Some(page) }, None),
            Err(error) => (Self { page: None }, Some(error)),
        }
    }

    /// Rings the doorbell with a phase of [`power`].
    pub fn ring(&self, phase: u32) {
        self.write(power::DOORBELL, phase);
    }

    /// Ends the machine. Returns when that cannot be done.
    pub fn off(&self) {
        self.write(power::OFF, 0);
        // Still here: there is no device. The kernel's reset is a triple fault in the end, which every monitor sees.
        let _ = rustix::system::reboot(RebootCommand::Restart);
    }

    fn write(&self, register: usize, value: u32) {
        if let Some(page) = &self.page {
            page.write(register, value);
        }
    }
}
