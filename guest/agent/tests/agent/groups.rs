//! Control groups for one agent out of many on a host that has one hierarchy for all.

use std::cell::RefCell;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use kiln_agent::Groups;
use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::mount::MountFlags;

static COUNTER: AtomicU32 = AtomicU32::new(0);

thread_local! {
    /// Where this thread's groups are.
    static OWN: RefCell<Option<PathBuf>> = const { RefCell::new(None) };
}

/// Groups for this thread's agent, in a group of their own below `hierarchy`.
pub(crate) fn own(hierarchy: &str) -> Groups {
    let number = COUNTER.fetch_add(1, Ordering::Relaxed);
    let own = Path::new(hierarchy).join(format!("kiln-agent-{}-{number}", std::process::id()));
    std::fs::create_dir(&own).expect("root may make a control group");
    let root: OwnedFd = File::open(&own).expect("the control group").into();
    OWN.set(Some(own));
    Groups::below(root).expect("a control group")
}

/// Ends what is left in this thread's groups, and removes them.
pub(crate) fn remove() {
    let Some(own) = OWN.take() else { return };
    std::fs::write(own.join("kiln/cgroup.kill"), "1").expect("a control group");
    wait_until_empty(&own.join("kiln"));
    remove_below(&own);
    // What set-up made at the root of the hierarchy; other tests may use it.
    if rustix::mount::mount("cgroup", "/sys/fs/cgroup", "cgroup2", MountFlags::empty(), None).is_ok() {
        for name in ["kiln/commands", "kiln"] {
            let _ = rustix::fs::rmdir(Path::new("/sys/fs/cgroup").join(name));
        }
    }
}

/// Removes a group and all below it, which nobody is in.
fn remove_below(group: &Path) {
    for entry in std::fs::read_dir(group).expect("a control group").flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_below(&entry.path());
        }
    }
    rustix::fs::rmdir(group).expect("an empty control group");
}

fn wait_until_empty(group: &Path) {
    let path = group.join("cgroup.events");
    let events = File::open(&path).expect("a control group");
    while !std::fs::read_to_string(&path).expect("a control group").contains("populated 0") {
        match rustix::event::poll(&mut [PollFd::new(&events, PollFlags::PRI)], None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => panic!("{error}"),
        }
        rustix::io::pread(&events, &mut [0; 64], 0).expect("a control group");
    }
}
