//! A restored guest becomes the one its mail says.
//!
//! Nothing of the guest's users runs between the snapshot and the end of this, so none can see a generator that repeats
//! itself, a clock that stands where it stood, or another guest's name.

use alloc::format;
use alloc::string::String;

use kiln_protocol::Failed;
use kiln_protocol::mailbox::Generation;
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::time::{ClockId, Timespec};

use crate::failure::{internal, text};
use crate::identity::Life;
use crate::power::Taken;
use crate::sys;
use crate::workload::Place;

const NS_PER_SECOND: u64 = 1_000_000_000;

/// A moment on two clocks.
#[derive(Clone, Copy)]
pub(crate) struct Moment {
    ticks: u64,
    monotonic_ns: u64,
}

/// How fast the processor's counter runs: so many ticks are so many nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Rate {
    ticks: u64,
    ns: u64,
}

impl Moment {
    pub(crate) fn now() -> Self {
        Self { ticks: sys::ticks(), monotonic_ns: sys::monotonic_ns() }
    }

    /// What the counter did since `earlier`, a moment of the same life.
    pub(crate) fn rate_since(self, earlier: Self) -> Rate {
        Rate {
            ticks: self.ticks.wrapping_sub(earlier.ticks),
            ns: self.monotonic_ns.saturating_sub(earlier.monotonic_ns),
        }
    }
}

impl Rate {
    fn ns(self, ticks: u64) -> u64 {
        // Exact to the nanosecond for weeks, which is more than the clocks are.
        (ticks as f64 * (self.ns as f64 / self.ticks.max(1) as f64)) as u64
    }
}

/// Makes this guest the one of the mail in `taken`, and returns its life.
///
/// `place` is where commands run, if set-up has made one; otherwise `random` is /dev/urandom.
///
/// # Errors
/// Why it cannot be: nothing of a user may run then.
#[cold]
#[inline(never)]
pub(crate) fn adopt(
    taken: &mut Taken,
    random: Option<&OwnedFd>,
    place: Option<&mut Place>,
    rate: Rate,
    counter: u64,
) -> Result<Life, Failed> {
    let random = place.as_ref().map(|place| &place.random).or(random);
    let generation = Generation::decode(&taken.mail);
    let seeded = generation.as_ref().map(|generation| match random {
        Some(random) => sys::add_entropy(random, &generation.entropy),
        None => Err(Errno::NODEV),
    });
    sys::wipe(&mut taken.mail);
    let (Some(mut generation), Some(seeded)) = (generation, seeded) else {
        return Err(crate::failure::invalid("the mail names no host that could be".into()));
    };
    sys::wipe(&mut generation.entropy);
    seeded.map_err(|error| internal("seed the random generator", error))?;
    set_clock(&generation, || rate.ns(sys::ticks().wrapping_sub(taken.ticks)))?;
    let life = Life::of(&generation, counter);
    bound(&generation, place.as_deref())?;
    name(generation.hostname, place, &life)?;
    Ok(life)
}

fn set_clock(generation: &Generation, since: impl FnOnce() -> u64) -> Result<(), Failed> {
    if generation.realtime_ns == 0 {
        return Ok(());
    }
    let now = generation.realtime_ns.saturating_add(since());
    rustix::time::clock_settime(ClockId::Realtime, timespec(now))
        .map_err(|error| internal("set the clock", error))
}

fn bound(generation: &Generation, place: Option<&Place>) -> Result<(), Failed> {
    if generation.bounds.is_none() {
        return Ok(());
    }
    match place.and_then(|place| place.groups.as_ref()) {
        Some(groups) => groups.bound(generation.bounds),
        None => Err(crate::failure::invalid("the guest has no control groups to bound processes by".into())),
    }
}

fn name(hostname: String, place: Option<&mut Place>, life: &Life) -> Result<(), Failed> {
    let is_new = place.as_ref().is_none_or(|place| place.hostname != hostname);
    if is_new {
        rustix::system::sethostname(hostname.as_bytes())
            .map_err(|error| internal("set the host name", error))?;
    }
    let Some(place) = place else { return Ok(()) };
    if let Some(files) = &place.identity {
        let written = files.live(life).and_then(|()| if is_new { files.rename(&hostname) } else { Ok(()) });
        written.map_err(|error| {
            crate::failure::failed(
                kiln_protocol::Reason::Internal,
                format!("cannot write the guest's names: {}", text(error)),
            )
        })?;
    }
    place.hostname = hostname;
    Ok(())
}

/// Nanoseconds since 1970-01-01 UTC as the kernel takes them.
pub(crate) fn timespec(ns: u64) -> Timespec {
    Timespec { tv_sec: (ns / NS_PER_SECOND) as i64, tv_nsec: (ns % NS_PER_SECOND) as i64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_told_in_nanoseconds() {
        let at = |ticks, monotonic_ns| Moment { ticks, monotonic_ns };
        let rate = at(7_000, 2_000).rate_since(at(1_000, 0));
        assert_eq!(rate, Rate { ticks: 6_000, ns: 2_000 });
        assert_eq!(rate.ns(3_000_000_000), 1_000_000_000);
    }

    #[test]
    fn a_counter_that_stands_still_tells_no_time() {
        assert_eq!(Rate { ticks: 0, ns: 0 }.ns(5), 0);
    }
}
