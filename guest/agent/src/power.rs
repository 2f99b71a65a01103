//! What the agent tells the monitor without words: that it runs, that it listens, that the machine is to end.

use kiln_protocol::power;

use crate::sys::PowerPage;

/// The way to the monitor that needs no guest kernel; without the device, a machine still works and ends by a reset.
pub struct Power {
    page: Option<PowerPage>,
}

impl Power {
    /// Finds the power device. A machine without one is reported on the console and goes on.
    pub fn find() -> Self {
        match PowerPage::map() {
            Ok(page) => Self { page: Some(page) },
            Err(error) => {
                eprintln!("kiln-agent: no power device, the host will not hear the doorbell: {error}");
                Self { page: None }
            }
        }
    }

    /// Rings the doorbell with a phase of [`power`].
    pub fn ring(&self, phase: u32) {
        self.write(power::DOORBELL, phase);
    }

    /// Says that what comes next is no orderly end.
    pub fn notice(&self, code: u32) {
        self.write(power::NOTICE, code);
    }

    /// Ends the machine.
    pub fn off(&self, code: u32) {
        self.write(power::OFF, code);
        // Still here: there is no device. The kernel's reset is a triple fault in the end, which every monitor sees.
        let error = rustix::system::reboot(rustix::system::RebootCommand::Restart);
        eprintln!("kiln-agent: cannot even reset: {error:?}");
    }

    fn write(&self, register: usize, value: u32) {
        if let Some(page) = &self.page {
            page.write(register, value);
        }
    }
}
