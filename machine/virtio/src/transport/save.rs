//! A device between two machines: everything its registers and queues are, out of one transport and into another.
//!
//! What is restored may come from anywhere. It is checked as what a driver writes is, and gives a device such as a driver
//! could have brought about, or an error.

use std::sync::Arc;

use kiln_memory::GuestMemory;

use super::{State, Transport, VIRTIO_F_EVENT_IDX, status};
use crate::{Broken, Device, Interrupt, Queue, QueueLayout, QueueProgress, Session};

/// Everything a stopped device and its registers are, its files and sockets apart.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TransportState {
    /// The device type, VIRTIO 1.2 §5 "Device Types".
    pub device_type: u32,
    /// The device status without [`needs_reset`](Self::needs_reset).
    pub status: u32,
    /// The driver broke the device and has not reset it.
    pub needs_reset: bool,
    /// Which half of the device's features the driver reads.
    pub device_features_sel: u32,
    /// Which half of its own it writes.
    pub driver_features_sel: u32,
    /// The features it accepted.
    pub driver_features: u64,
    /// The queue it sets up.
    pub queue_sel: u32,
    /// What it has not acknowledged.
    pub interrupt_status: u32,
    /// How often the configuration changed.
    pub config_generation: u32,
    /// The device kept something for its driver that is not saved, open connections for one.
    pub kept: bool,
    /// All queues of the device.
    pub queues: Vec<QueueState>,
}

/// A queue as the driver set it up, and how far it has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueState {
    /// Where it is.
    pub layout: QueueLayout,
    /// The driver has finished setting it up.
    pub ready: bool,
    /// How far it has come, when its device was running.
    pub progress: Option<QueueProgress>,
}

/// A saved device cannot be restored: its state is not one that this device can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RestoreError {
    /// It is another kind of device.
    #[error("a device of type {found} where one of type {expected} was saved")]
    DeviceType {
        /// What was saved.
        expected: u32,
        /// What there is.
        found: u32,
    },
    /// The driver's steps are in no order in which it could have made them.
    #[error("device status {0:#x}")]
    Status(u32),
    /// The driver accepted features that are not offered.
    #[error("features {0:#x} that the device does not have")]
    Features(u64),
    /// The device has another number of queues.
    #[error("{0} queues")]
    Queues(usize),
    /// Some queues were running and others were not.
    #[error("a device that is half running")]
    HalfRunning,
    /// A queue is where none may be.
    #[error(transparent)]
    Queue(#[from] Broken),
}

impl Transport {
    /// The transport of `device` as it was when its like was [saved](Self::save), paused.
    ///
    /// # Errors
    /// [`RestoreError`]
    pub fn restore(
        device: Box<dyn Device>,
        memory: GuestMemory,
        interrupt: Arc<dyn Interrupt>,
        saved: &TransportState,
    ) -> Result<Self, RestoreError> {
        let transport = Self::new(device, memory, interrupt);
        transport.state().restore(saved)?;
        Ok(transport)
    }

    /// Begins what [`pause`](Self::pause) waits for, which must follow; the vCPUs rest.
    pub fn begin_pause(&self) {
        self.state().device.begin_stop();
    }

    /// Stops the device and keeps what it worked with, unless it is broken. Requests of a guest that runs meanwhile are served after
    /// [`resume`](Self::resume); what stops the device stops it for good.
    pub fn pause(&self) {
        let mut state = self.state();
        let session = state.device.stop();
        state.held = session.filter(|_| !state.needs_reset());
    }

    /// Lets a paused device go on.
    pub fn resume(&self) {
        let mut state = self.state();
        if let Some(session) = state.held.take()
            && let Err(error) = state.device.start(session)
        {
            state.signal.broken(Broken::Host(error.kind()));
        }
    }

    /// Everything that makes a paused device, for [`restore`](Self::restore); `None` while requests are in flight.
    pub fn save(&self) -> Option<TransportState> {
        self.state().save()
    }
}

impl State {
    fn save(&self) -> Option<TransportState> {
        let mut queues = Vec::with_capacity(self.queues.len());
        for (index, registers) in self.queues.iter().enumerate() {
            let running = self.held.as_ref().and_then(|session| session.queues.get(index));
            let progress = match running {
                Some(queue) => Some(queue.progress()?),
                None => None,
            };
            queues.push(QueueState { layout: registers.layout, ready: registers.ready, progress });
        }
        Some(TransportState {
            device_type: self.device.device_type(),
            status: self.status,
            needs_reset: self.needs_reset(),
            device_features_sel: self.device_features_sel,
            driver_features_sel: self.driver_features_sel,
            driver_features: self.driver_features,
            queue_sel: self.queue_sel,
            interrupt_status: self.signal.interrupt_status(),
            config_generation: self.signal.config_generation(),
            kept: self.held.as_ref().is_some_and(|session| session.kept.is_some() || session.lost),
            queues,
        })
    }

    fn restore(&mut self, saved: &TransportState) -> Result<(), RestoreError> {
        let found = self.device.device_type();
        if found != saved.device_type {
            return Err(RestoreError::DeviceType { expected: saved.device_type, found });
        }
        if !is_possible(saved.status) {
            return Err(RestoreError::Status(saved.status));
        }
        let accepted = saved.status & status::FEATURES_OK != 0;
        if accepted && saved.driver_features & !self.offered() != 0 {
            return Err(RestoreError::Features(saved.driver_features & !self.offered()));
        }
        if saved.queues.len() != self.queues.len() {
            return Err(RestoreError::Queues(saved.queues.len()));
        }
        let event_idx = saved.driver_features & VIRTIO_F_EVENT_IDX != 0;
        let mut queues = Vec::new();
        for (registers, saved) in self.queues.iter_mut().zip(&saved.queues) {
            registers.layout = saved.layout;
            registers.ready = saved.ready;
            if let Some(progress) = saved.progress {
                let (layout, entries) = (saved.layout, registers.max_entries);
                queues.push(Queue::resume(&self.memory, layout, entries, event_idx, progress)?);
            }
        }
        if !queues.is_empty() {
            if queues.len() != self.queues.len() || saved.status & status::DRIVER_OK == 0 || saved.needs_reset
            {
                return Err(RestoreError::HalfRunning);
            }
            self.held = Some(Session {
                features: saved.driver_features,
                memory: self.memory.clone(),
                queues,
                signal: Arc::clone(&self.signal),
                kept: None,
                restored: true,
                lost: saved.kept,
            });
        }
        self.signal.restore(saved.interrupt_status, saved.config_generation, saved.needs_reset);
        self.status = saved.status;
        self.device_features_sel = saved.device_features_sel;
        self.driver_features_sel = saved.driver_features_sel;
        self.driver_features = saved.driver_features;
        self.queue_sel = saved.queue_sel;
        Ok(())
    }
}

/// Whether a driver's steps can lead to `status`: each needs those before it.
fn is_possible(status: u32) -> bool {
    use status::{ACKNOWLEDGE, DRIVER, DRIVER_OK, FAILED, FEATURES_OK};
    let steps = [
        0,
        ACKNOWLEDGE,
        ACKNOWLEDGE | DRIVER,
        ACKNOWLEDGE | DRIVER | FEATURES_OK,
        ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK,
    ];
    steps.contains(&(status & !FAILED))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::Rng;
    use crate::testing::Raised;
    use kiln_memory::Gpa;

    fn queue() -> impl Strategy<Value = QueueState> {
        let address = prop_oneof![3 => (0_u64..0x400).prop_map(|page| Gpa(page * 0x10)), 1 => any::<u64>().prop_map(Gpa)];
        let entries = prop_oneof![3 => (0_u32..10).prop_map(|bit| 1 << bit), 1 => any::<u32>()];
        let layout = (entries, address.clone(), address.clone(), address);
        let progress = prop::option::of((any::<u16>(), any::<u16>(), any::<u16>()));
        (layout, any::<bool>(), progress).prop_map(
            |((entries, descriptors, available, used), ready, progress)| {
                let layout = QueueLayout { entries, descriptors, available, used };
                let progress = progress.map(|(next_available, next_used, considered_used)| QueueProgress {
                    next_available,
                    next_used,
                    considered_used,
                });
                QueueState { layout, ready, progress }
            },
        )
    }

    fn state() -> impl Strategy<Value = TransportState> {
        let status = prop_oneof![4 => Just(15_u32), 2 => 0_u32..256, 1 => any::<u32>()];
        let features = prop_oneof![Just(1_u64 << 32), Just(1 << 32 | 1 << 29), any::<u64>()];
        let queues =
            prop_oneof![4 => prop::collection::vec(queue(), 1), 1 => prop::collection::vec(queue(), 0..4)];
        let device_type = prop_oneof![9 => Just(4_u32), 1 => any::<u32>()];
        (device_type, status, features, queues, prop::bool::weighted(0.2), any::<[u32; 5]>()).prop_map(
            |(device_type, status, driver_features, queues, needs_reset, words)| TransportState {
                device_type,
                status,
                needs_reset,
                device_features_sel: words[0],
                driver_features_sel: words[1],
                driver_features,
                queue_sel: words[2],
                interrupt_status: words[3],
                config_generation: words[4],
                kept: status == 15
                    && words[0] % 2 == 0
                    && queues.iter().all(|queue| queue.progress.is_some()),
                queues,
            },
        )
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(2000) })]

        #[test]
        fn any_state_is_refused_or_restored_as_it_is(state in state()) {
            let memory = GuestMemory::new(1 << 20).expect("mapped");
            let line = Arc::new(Raised::default());
            match Transport::restore(Box::new(Rng::new()), memory, line, &state) {
                Ok(transport) => {
                    prop_assert!(is_possible(state.status));
                    prop_assert_eq!(transport.save(), Some(state));
                    transport.resume();
                    let mut status = [0; 4];
                    transport.read(0x70, &mut status);
                }
                Err(RestoreError::DeviceType { expected, .. }) => prop_assert_ne!(expected, 4),
                Err(RestoreError::Queues(count)) => prop_assert_ne!(count, 1),
                Err(_) => {}
            }
        }
    }
}
