//! How far a machine has come: what its monitor reported, for any number of waiters.

use std::sync::Arc;

use kiln_control::{Entered, Happened, MAX_CONSOLE_BYTES, Saved, Standing};
use tokio::sync::watch;

use super::MachineEnd;

/// Times a machine has passed on its way up, as host `CLOCK_MONOTONIC` in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BootTimes {
    /// The monitor's first own act.
    pub spawned_ns: u64,
    /// The first vCPU entered the guest.
    pub entered_ns: u64,
    /// The agent's first instruction, or 0 when it did not announce itself.
    pub agent_started_ns: u64,
    /// The agent listens.
    pub ready_ns: u64,
}

/// Times a restored machine has passed, as host `CLOCK_MONOTONIC` in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RestoreTimes {
    /// The monitor's first own act.
    pub spawned_ns: u64,
    /// The order had come.
    pub ordered_ns: u64,
    /// The first vCPU entered the guest.
    pub entered_ns: u64,
    /// The agent had taken its generation; of one that was parked at its port, it had asked for it.
    pub resumed_ns: u64,
    /// The guest had become who its generation says; 0 when it had not when it was asked.
    pub adopted_ns: u64,
}

/// How far a machine has come. What can happen more than once is counted, so that a waiter knows what is news.
#[derive(Clone, Debug, Default)]
pub(super) struct Life {
    pub(super) booted: bool,
    pub(super) ready: bool,
    pub(super) boot: BootTimes,
    pub(super) restore: RestoreTimes,
    pub(super) parked: u64,
    pub(super) parked_ns: u64,
    pub(super) paused: u64,
    pub(super) pause_took_ns: u64,
    pub(super) entered: u64,
    pub(super) last_entered: Entered,
    pub(super) resumed: u64,
    pub(super) adopted: u64,
    pub(super) saved: u64,
    pub(super) last_saved: Saved,
    pub(super) prepared: bool,
    pub(super) stood: u64,
    pub(super) last_stood: Standing,
    pub(super) consoles: u64,
    pub(super) console: Vec<u8>,
    pub(super) end: Option<Arc<MachineEnd>>,
}

impl Life {
    /// Takes note of an event that is not the last.
    pub(super) fn take(&mut self, happened: Happened) {
        match happened {
            Happened::Booted(booted) => {
                self.booted = true;
                self.boot.spawned_ns = booted.spawned_ns;
                self.boot.entered_ns = booted.entered_ns;
            }
            Happened::Ready(ready) => {
                self.ready = true;
                self.boot.agent_started_ns = ready.agent_started_ns;
                self.boot.ready_ns = ready.ready_ns;
            }
            Happened::Parked(parked) => {
                self.parked += 1;
                self.parked_ns = parked.at_ns;
            }
            Happened::Paused(paused) => {
                self.paused += 1;
                self.pause_took_ns = paused.took_ns;
            }
            Happened::Entered(entered) => {
                self.entered += 1;
                self.last_entered = entered;
                self.restore.spawned_ns = entered.spawned_ns;
                self.restore.ordered_ns = entered.ordered_ns;
                self.restore.entered_ns = entered.entered_ns;
                // What was before was another life's.
                (self.restore.resumed_ns, self.restore.adopted_ns) = (0, 0);
            }
            Happened::Resumed(resumed) => {
                if let Some(entered) = resumed.entered {
                    self.take(Happened::Entered(entered));
                }
                self.resumed += 1;
                self.restore.resumed_ns = resumed.at_ns;
            }
            Happened::Adopted(adopted) => {
                self.adopted += 1;
                self.restore.adopted_ns = adopted.at_ns;
            }
            Happened::Saved(saved) => {
                self.saved += 1;
                self.last_saved = saved;
            }
            Happened::Prepared(_) => self.prepared = true,
            Happened::Standing(standing) => {
                self.stood += 1;
                self.last_stood = standing;
            }
            Happened::Console(console) => {
                self.consoles += 1;
                self.console = console.tail;
                // Whatever a monitor says that its guest has taken over.
                self.console.truncate(MAX_CONSOLE_BYTES);
            }
            Happened::Ended(_) | Happened::Failed(_) => {}
        }
    }

    fn how_it_ended(&self) -> Arc<MachineEnd> {
        self.end.clone().unwrap_or_default()
    }
}

/// Waits until a machine has come so far, and returns what `reached` makes of it; its end is the error.
pub(super) async fn reach<T>(
    mut life: watch::Receiver<Life>,
    reached: impl Fn(&Life) -> Option<T>,
) -> Result<T, Arc<MachineEnd>> {
    match life.wait_for(|life| life.end.is_some() || reached(life).is_some()).await {
        Ok(life) => reached(&life).ok_or_else(|| life.how_it_ended()),
        // A machine whose handle was dropped has been stopped.
        Err(_) => Err(Arc::default()),
    }
}

/// Waits for the end of a machine, whoever's it is by then.
#[derive(Debug)]
pub(crate) struct DeathWatch {
    pub(super) life: watch::Receiver<Life>,
}

impl DeathWatch {
    /// Waits for the end of the machine, or of its handle.
    pub(crate) async fn ended(&mut self) {
        let _ = self.life.wait_for(|life| life.end.is_some()).await;
    }
}

/// Waits for the end of a machine without keeping it alive. A machine that is given to its next owner has ended for this one's.
#[derive(Clone, Debug)]
pub(crate) struct EndWatch {
    pub(super) life: watch::Receiver<Life>,
    pub(super) owner: watch::Receiver<u64>,
    /// Whose the machine was when this was made.
    pub(super) of: u64,
}

impl EndWatch {
    /// Waits for the end of the machine; a machine whose handle was dropped has been stopped.
    pub(crate) async fn ended(&mut self) -> Arc<MachineEnd> {
        let Self { life, owner, of } = self;
        let given_away = async {
            if owner.wait_for(|owner| owner != of).await.is_err() {
                // Without a handle there is no next owner.
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            biased;
            () = given_away => Arc::default(),
            ended = life.wait_for(|life| life.end.is_some()) => match ended {
                Ok(life) => life.how_it_ended(),
                Err(_) => Arc::default(),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_happened_before_the_end_is_known_after_it() {
        let (sender, life) = watch::channel(Life::default());
        sender.send_modify(|life| {
            life.take(Happened::Resumed(kiln_control::Resumed { at_ns: 7, entered: None }));
        });
        sender.send_modify(|life| life.end = Some(Arc::new(MachineEnd::PowerOff)));
        let resumed = reach(life.clone(), |life| (life.resumed > 0).then_some(life.restore.resumed_ns)).await;
        assert_eq!(resumed.ok(), Some(7));
        let adopted = reach(life, |life| (life.adopted > 0).then_some(())).await;
        assert_eq!(*adopted.expect_err("it powered off before"), MachineEnd::PowerOff);
    }

    #[tokio::test]
    async fn a_machine_whose_handle_is_gone_has_stopped() {
        let (sender, life) = watch::channel(Life::default());
        drop(sender);
        assert!(reach(life, |life| life.ready.then_some(())).await.is_err());
    }

    #[tokio::test]
    async fn who_had_a_machine_does_not_hear_how_the_next_guest_ends() {
        let (life_sender, life) = watch::channel(Life::default());
        let (owner_sender, owner) = watch::channel(0);
        let mut before = EndWatch { life: life.clone(), owner: owner.clone(), of: 0 };
        owner_sender.send_replace(1);
        let mut after = EndWatch { life, owner, of: 1 };
        life_sender.send_modify(|life| life.end = Some(Arc::new(MachineEnd::PowerOff)));
        assert_eq!(*before.ended().await, MachineEnd::default());
        assert_eq!(*after.ended().await, MachineEnd::PowerOff);
    }
}
