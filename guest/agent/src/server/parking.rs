//! Parking: the guest stands still, is saved, and goes on as the one it was or as another.
//!
//! ```text
//! serving ──Park──▶ frozen, disk written ──ring──▶ at the doorbell ──┬─ no mail ───────────────▶ thawed, serving
//!                            │                                       ├─ mail ─▶ adopted ─ring──▶ hooks, thawed
//!                            └──────Parked───────▶ at the port ──────┼─ Become {} ─────Done────▶ thawed, serving
//!                                                                    └─ Become ▶ adopted ─Became▶ hooks, thawed
//! ```
//! A guest whose kernel gives no access to the doorbell says that it is parked in its answer, and waits at its port for
//! the host to call ([`crate::caller`]). What it is told there and what it makes of it are the same.

use alloc::ffi::CString;
use alloc::vec::Vec;

use kiln_protocol::mailbox::{GENERATION_BYTES, ID_BYTES};
use kiln_protocol::{Became, Done, Failed, Outcome, power};

use super::{Agent, Fault, first_process};
use crate::adopt::{Moment, adopt};
use crate::caller::{self, Told};
use crate::connection::Stage;
use crate::failure::{internal, invalid};
use crate::freezer::Frozen;
use crate::hooks;
use crate::power::Taken;
use crate::setup::prepare;

/// A guest made ready to park.
pub(super) struct Parking {
    frozen: Frozen,
    hooks: Vec<CString>,
}

impl Agent<'_> {
    /// Stops the guest's processes and writes out what they wrote, so that memory and disk are of one moment.
    #[cold]
    pub(super) fn make_ready_to_park(&mut self) -> Result<Parking, Failed> {
        if self.stopping.is_some() {
            return Err(invalid("the guest is powering off".into()));
        }
        self.is_not_parking()?;
        let now = Moment::now();
        self.rate.get_or_insert_with(|| now.rate_since(self.started));
        let Some(workload) = &self.workload else {
            if self.prepared.is_none() {
                self.prepared = Some(prepare()?);
            }
            return Ok(Parking { frozen: Frozen::default(), hooks: Vec::new() });
        };
        let hooks = hooks::find();
        let frozen = workload.freeze()?;
        if let Some(scratch) = &workload.place.scratch
            && let Err(error) = rustix::fs::syncfs(scratch)
        {
            frozen.thaw();
            return Err(internal("write out the scratch disk", error));
        }
        Ok(Parking { frozen, hooks })
    }

    /// Parks; comes back as the guest it was, or as another.
    #[inline(never)]
    pub(super) fn park(&mut self, parking: Parking) -> Result<(), Fault> {
        for connection in &mut self.connections {
            connection.take_if(|connection| {
                matches!(connection.stage, Stage::Asking | Stage::Waiting(_) | Stage::Answered)
            });
        }
        // What closing them has left for the kernel to do is done now, and not after each restore.
        rustix::thread::sched_yield();
        let mut taken = Taken { mail: [0; GENERATION_BYTES], ticks: 0 };
        if !self.power.has_doorbell() {
            self.wait_at_port(&mut taken, &parking)?;
        } else if self.power.park(&mut taken) {
            self.adopt(&mut taken, &parking, |agent| {
                agent.power.ring(power::PHASE_ADOPTED);
                Ok(())
            })?;
        }
        parking.frozen.thaw();
        Ok(())
    }

    /// Waits until the host says who the guest is, and becomes that. Until then nothing else is heard.
    #[cold]
    #[inline(never)]
    fn wait_at_port(&mut self, taken: &mut Taken, parking: &Parking) -> Result<(), Fault> {
        let (mut caller, told) = caller::wait(&self.listener, taken).map_err(Fault::Serving)?;
        match told {
            Told::GoOn => {
                // A host that does not hear it has given up, and says so to whoever waits.
                let _ = caller.answer(Outcome::Done(Done {}));
                Ok(())
            }
            Told::Become => {
                let id = taken.mail[..ID_BYTES].to_vec();
                self.adopt(taken, parking, |_| {
                    let heard = caller.answer(Outcome::Became(Became { id }));
                    heard.map_err(|_| Fault::NotAdopted("the host does not hear that it has".into()))
                })
            }
        }
    }

    /// Becomes the guest of the mail in `taken`, and acknowledges it before anything of the image runs.
    #[cold]
    #[inline(never)]
    fn adopt(
        &mut self,
        taken: &mut Taken,
        parking: &Parking,
        acknowledge: impl FnOnce(&Self) -> Result<(), Fault>,
    ) -> Result<(), Fault> {
        let counter = self.restores().saturating_add(1);
        let rate = self.rate.unwrap_or_default();
        let place = self.workload.as_mut().map(|workload| &mut workload.place);
        let random = self.prepared.as_ref().map(|prepared| &prepared.random);
        let life =
            adopt(taken, random, place, rate, counter).map_err(|failed| Fault::NotAdopted(failed.message))?;
        acknowledge(self)?;
        if let Some(workload) = &mut self.workload {
            hooks::run(&parking.hooks, workload, first_process(&self.connections), &life);
        }
        self.life = Some(life);
        Ok(())
    }
}
