//! Pools of machines, as the library's users meet them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use kiln::{Image, OnRelease, Pool, PoolError, PoolStats, Vm};
use kiln_testkit::image::debian_with_probe;
use kiln_tests::library::sh;
use kiln_tests::{busybox, library};
use rustix::process::{Pid, Signal, kill_process, test_kill_process};

/// How long anything may take on a host with much to do.
const PATIENCE: Duration = Duration::from_mins(5);

async fn image() -> Image {
    library::image(&busybox()).build().await.expect("an image")
}

/// Waits until a pool is as it is to be.
async fn until(pool: &Pool, is_so: impl Fn(&PoolStats) -> bool) -> PoolStats {
    let waited = tokio::time::timeout(PATIENCE, pool.until(is_so)).await;
    waited.unwrap_or_else(|_| panic!("{:?}", pool.stats()))
}

/// Something that no other run of the tests has.
fn marker() -> String {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).expect("random bytes");
    format!("{:032x}", u128::from_be_bytes(bytes))
}

/// Where in the memory of a process `marker` is: the mappings' names.
fn mappings_with(process: u32, marker: &str) -> Vec<String> {
    let memory = File::open(format!("/proc/{process}/mem")).expect("this test runs as root");
    let maps = std::fs::read_to_string(format!("/proc/{process}/maps")).expect("it lives");
    let mut found = Vec::new();
    for line in maps.lines().filter(|line| line.split(' ').nth(1).is_some_and(|mode| mode.starts_with("rw")))
    {
        let range = line.split(' ').next().and_then(|range| range.split_once('-')).expect("a range");
        let [mut at, end] = [range.0, range.1].map(|end| u64::from_str_radix(end, 16).expect("an address"));
        let mut window = Vec::new();
        while at < end {
            let mut piece = vec![0; (end - at).min(1 << 20) as usize];
            // What cannot be read is nobody's.
            let Ok(count @ 1..) = memory.read_at(&mut piece, at) else { break };
            window.extend_from_slice(&piece[..count]);
            if window.windows(marker.len()).any(|bytes| bytes == marker.as_bytes()) {
                found.push(line.to_owned());
                break;
            }
            window.drain(..window.len().saturating_sub(marker.len()));
            at += count as u64;
        }
    }
    found
}

/// The number of open descriptors of a process.
fn descriptors(process: u32) -> usize {
    std::fs::read_dir(format!("/proc/{process}/fd")).expect("this test runs as root").count()
}

fn pid(vm: &Vm) -> Pid {
    Pid::from_raw(vm.monitor_id() as i32).expect("a process")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_comes_back_as_new() {
    let pool = image().await.pool().min(1).max(1).build();
    let (mut names, mut processes) = (Vec::new(), Vec::new());
    for round in 0..4 {
        let vm = pool.acquire().await.expect("a machine");
        processes.push(vm.monitor_id());
        let name = sh(&vm, "hostname; cat /etc/hostname /proc/sys/kernel/random/boot_id").await;
        assert!(!names.contains(&name), "{name}");
        names.push(name);
        let left = "cat /left /tmp/left /dev/shm/left 2>/dev/null; ps -o args | grep -c '[s]leep 1234'; true";
        assert_eq!(sh(&vm, left).await, "0", "round {round}");
        let leave = "for f in /left /tmp/left /dev/shm/left; do echo left > $f; done; sync; sleep 1234 >/dev/null 2>&1 &";
        sh(&vm, leave).await;
        assert_eq!(pool.stats().leased, 1);
        vm.release();
    }
    let stats = until(&pool, |stats| stats.idle == 1).await;
    assert_eq!((stats.recycled, stats.acquired, stats.failed), (4, 4, 0), "{stats:?}");
    processes.dedup();
    assert_eq!(processes.len(), 1, "all in the same process");
    pool.shutdown().await;
    assert!(matches!(pool.acquire().await, Err(PoolError::Closed)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_that_is_not_restored_is_as_its_last_owner_left_it() {
    let pool = image().await.pool().min(0).max(1).restore_on_release(false).build();
    let vm = pool.acquire().await.expect("a machine");
    sh(&vm, "echo mine > /left").await;
    vm.release();
    let vm = pool.acquire().await.expect("the machine");
    assert_eq!(sh(&vm, "cat /left").await, "mine");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_comes_first_is_served_first() {
    let pool = image().await.pool().min(0).max(1).build();
    let first = pool.acquire().await.expect("a machine");
    let (told, mut served) = tokio::sync::mpsc::unbounded_channel();
    let mut line = tokio::task::JoinSet::new();
    for place in 0..4 {
        let (waiting, told) = (pool.clone(), told.clone());
        line.spawn(async move {
            let vm = waiting.acquire().await.expect("a machine in time");
            told.send(place).expect("the test listens");
            drop(vm);
        });
        until(&pool, |stats| stats.waiting == place + 1).await;
    }
    // One who gives up leaves the line to the others.
    let gone = tokio::time::timeout(Duration::from_millis(10), pool.acquire()).await;
    assert!(gone.is_err());
    until(&pool, |stats| stats.waiting == 4).await;
    drop(first);
    for place in 0..4 {
        assert_eq!(served.recv().await, Some(place));
    }
    while let Some(done) = line.join_next().await {
        done.expect("no panic");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_gives_up_while_a_machine_becomes_his_leaves_it_to_the_next() {
    let pool = image().await.pool().min(1).max(1).shells(0).build();
    let vm = pool.acquire().await.expect("a machine");
    let (process, name) = (vm.monitor_id(), sh(&vm, "hostname").await);
    vm.release();
    let made = until(&pool, |stats| stats.idle == 1).await.made;
    while pool.stats().recycled < 4 {
        tokio::select! {
            biased;
            // On a host with much to do it may have answered by then, and goes back as any that is dropped.
            _ = pool.acquire() => {}
            () = std::future::ready(()) => {}
        }
        let stats = until(&pool, |stats| stats.idle == 1).await;
        assert_eq!((stats.made, stats.failed), (made, 0), "{stats:?}");
    }
    let vm = pool.acquire().await.expect("a machine");
    assert_eq!(vm.monitor_id(), process);
    assert_ne!(sh(&vm, "hostname").await, name);
}

/// Its handle is there still, and somebody else could not listen there.
#[tokio::test(flavor = "multi_thread")]
async fn a_port_is_closed_with_the_lease_of_its_machine() {
    let pool = image().await.pool().min(1).max(1).shells(0).build();
    let vm = pool.acquire().await.expect("a machine");
    let mut exposed = vm.expose_tcp(None, 7).await.expect("a port of the host's");
    let address = exposed.local_addr();
    vm.release();
    tokio::time::timeout(PATIENCE, exposed.closed()).await.expect("it is closed");
    std::net::TcpListener::bind(address).expect("nobody listens there");
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_waits_longer_than_he_wants() {
    let pool = image().await.pool().min(0).max(1).acquire_timeout(Duration::from_millis(50)).build();
    let vm = pool.acquire().await.expect("it waits already, or is made on the way, which has another limit");
    let error = pool.acquire().await.expect_err("it is taken");
    assert_eq!(error.to_string(), "no machine was free within 0.1 s: all 1 are taken");
    assert_eq!(error.blame(), kiln::Blame::Caller);
    assert_eq!(pool.stats().waiting, 0, "who has gone does not wait");
    drop(vm);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_burst_on_an_empty_pool_is_served_to_the_last() {
    let pool = image().await.pool().min(0).max(32).acquire_timeout(PATIENCE).build();
    let mut burst = tokio::task::JoinSet::new();
    for _ in 0..32 {
        let pool = pool.clone();
        burst.spawn(async move { pool.acquire().await });
    }
    let mut machines = Vec::new();
    while let Some(acquired) = burst.join_next().await {
        machines.push(acquired.expect("no panic").expect("a machine"));
    }
    let mut processes: Vec<_> = machines.iter().map(Vm::monitor_id).collect();
    processes.sort_unstable();
    processes.dedup();
    assert_eq!(processes.len(), 32);
    let stats = pool.stats();
    assert_eq!((stats.leased, stats.acquired, stats.failed), (32, 32, 0), "{stats:?}");
    drop(machines);
    pool.shutdown().await;
    for process in processes {
        assert!(test_kill_process(Pid::from_raw(process as i32).expect("a process")).is_err());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn machines_that_died_are_made_up_for() {
    let pool = image().await.pool().min(2).max(4).shells(0).build();
    let vm = pool.acquire().await.expect("a machine");
    let other = pool.acquire().await.expect("the next");
    // One dies while somebody has it, the other in wait.
    kill_process(pid(&vm), Signal::KILL).expect("it lives");
    vm.ended().await;
    assert!(vm.exec(["true"]).output().await.is_err());
    let dead = [pid(&vm), pid(&other)];
    drop(vm);
    other.release();
    let before = until(&pool, |stats| stats.idle >= 2 && stats.total() == stats.idle).await;
    kill_process(dead[1], Signal::KILL).expect("it lives");
    until(&pool, |stats| stats.total() < before.total() || stats.made > before.made).await;
    let machines = [pool.acquire().await.expect("a machine"), pool.acquire().await.expect("another")];
    for vm in &machines {
        assert!(!dead.contains(&pid(vm)));
        assert_eq!(sh(vm, "echo alive").await, "alive");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_that_is_replaced_has_another_process() {
    let pool = image().await.pool().min(1).max(1).on_release(OnRelease::Replace).build();
    let vm = pool.acquire().await.expect("a machine");
    let before = vm.monitor_id();
    vm.release();
    let vm = pool.acquire().await.expect("another");
    assert_ne!(vm.monitor_id(), before);
    assert_eq!(pool.stats().recycled, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_turn_that_is_not_taken_is_not_lost_when_the_pool_closes() {
    let pool = image().await.pool().min(0).max(1).build();
    let vm = pool.acquire().await.expect("a machine");
    let waiting = pool.clone();
    let waiting = tokio::spawn(async move { waiting.acquire().await.map(drop) });
    until(&pool, |stats| stats.waiting == 1).await;
    vm.release();
    waiting.abort();
    tokio::time::timeout(PATIENCE, pool.shutdown()).await.expect("nothing is left");
    assert_eq!(pool.stats().total(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn machines_nobody_needs_end() {
    let pool = image().await.pool().min(1).max(4).idle_timeout(Duration::from_millis(10)).build();
    let mut machines = Vec::new();
    for _ in 0..3 {
        machines.push(pool.acquire().await.expect("a machine"));
    }
    drop(machines);
    until(&pool, |stats| stats.idle == 1 && stats.leased + stats.making + stats.recycling == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pool_that_is_dropped_leaves_what_is_leased() {
    let image = image().await;
    let pool = image.pool().min(2).max(3).build();
    let vm = pool.acquire().await.expect("a machine");
    until(&pool, |stats| stats.idle == 2).await;
    drop(pool);
    assert_eq!(sh(&vm, "echo on").await, "on");
    let process = pid(&vm);
    vm.release();
    let gone = async {
        while test_kill_process(process).is_ok() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, gone).await.expect("it ends with its owner");
}

/// What a guest can leave its marks on: disk, memory, file systems in memory, processes, sockets.
const DIRTY: &str = r#"
mark=$1
echo $mark > /left; mkdir /$mark; sync
for folder in /tmp /dev/shm /run; do echo $mark > $folder/$mark; done
mkdir -p /sys/fs/cgroup/$mark 2>/dev/null
sh -c 'while :; do sleep 100000; done' $mark >/dev/null 2>&1 &
nc -l -p 7777 >/dev/null 2>&1 &
head -c 400000 /dev/zero | tr '\0' x | sed "s/^/$mark/" > /dev/shm/much
until netstat -an | grep -q ':7777 '; do :; done
echo $mark
"#;
/// Says where it finds them, by name.
const LOOK: &str = r#"
mark=$(echo $1 | rev)
see() { name=$1; shift; "$@" 2>/dev/null | grep -q "$mark" && echo found in $name; }
see root ls /
see file cat /left
for folder in /tmp /dev/shm /run; do see $folder ls $folder; done
see memory cat /dev/shm/much
ps -o args | grep -q "[w]hile .* $mark" && echo found in processes
netstat -an | grep -q ':7777 ' && echo found in sockets
true
"#;
const MARKS: [&str; 8] = ["root", "file", "/tmp", "/dev/shm", "/run", "memory", "processes", "sockets"];

/// What of its marks a guest has. The marker goes in backwards, so that looking for it does not find itself.
async fn marks(vm: &Vm, marker: &str) -> Vec<String> {
    let backwards: String = marker.chars().rev().collect();
    let found = vm.exec(["sh", "-c", LOOK, "sh", &backwards]).output().await.expect("a shell runs");
    let found = String::from_utf8(found.stdout).expect("text");
    found.lines().filter_map(|line| line.strip_prefix("found in ")).map(ToOwned::to_owned).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_of_a_guest_is_left_for_the_next() {
    let pool = image().await.pool().min(1).max(1).shells(0).build();
    let mut open = Vec::new();
    for _ in 0..2 {
        let marker = marker();
        let vm = pool.acquire().await.expect("a machine");
        let process = vm.monitor_id();
        let left = vm.exec(["sh", "-c", DIRTY, "sh", &marker]).output().await.expect("a shell runs");
        assert_eq!(String::from_utf8_lossy(&left.stdout).trim(), marker, "{left:?}");
        assert_eq!(marks(&vm, &marker).await, MARKS, "what is there is found");
        assert_ne!(mappings_with(process, &marker), [""; 0], "from outside too");
        vm.release();
        until(&pool, |stats| stats.idle == 1).await;
        open.push(descriptors(process));
        // The next guest waits in the same process, which has forgotten the last one.
        assert_eq!(mappings_with(process, &marker), [""; 0]);

        let vm = pool.acquire().await.expect("the machine");
        assert_eq!(vm.monitor_id(), process);
        assert_eq!(marks(&vm, &marker).await, [""; 0]);
        vm.release();
        until(&pool, |stats| stats.idle == 1).await;
    }
    assert!(open.iter().all(|count| *count == open[0]), "descriptors: {open:?}");
}

/// `KILN_SOAK=10000 cargo xtask test pools::cycles` is the whole of it: as many guests at once as there are processors.
#[tokio::test(flavor = "multi_thread")]
async fn cycles_leave_nothing_behind() {
    const ROUNDS: usize = 20;
    let cycles: usize = std::env::var("KILN_SOAK").map_or(ROUNDS, |count| count.parse().expect("a number"));
    let is_long = cycles > ROUNDS;
    let guests = if is_long { std::thread::available_parallelism().map_or(1, usize::from) } else { 1 };
    let each = (cycles / ROUNDS / guests).max(1);
    let pool = image().await.pool().min(guests).max(guests).shells(0).build();
    let mut processes = BTreeSet::new();
    let mut samples = Vec::new();
    for round in 1..=ROUNDS {
        let cycling = (0..guests).map(|_| tokio::spawn(cycle(pool.clone(), each)));
        for task in cycling.collect::<Vec<_>>() {
            processes.extend(task.await.expect("no panic"));
        }
        let stats = until(&pool, |stats| stats.idle == guests).await;
        let done = round * each * guests;
        assert_eq!((stats.recycled, stats.failed, stats.total()), (done as u64, 0, guests), "{stats:?}");
        // With few cycles, this process has other tests in it, too.
        let own = is_long.then(std::process::id);
        let measured = processes.iter().copied().chain(own);
        samples.push(measured.map(|pid| (pid, (rss_kib(pid), descriptors(pid)))).collect::<BTreeMap<_, _>>());
        if is_long {
            eprintln!("{done}: (KiB, descriptors) of {guests} and the host {:?}", samples.last());
        }
    }
    assert_eq!(processes.len(), guests, "the same processes to the end");
    // After the first quarter, when caches are full.
    let settled = &samples[samples.len() / 4..];
    for (process, before) in &settled[0] {
        let after = settled.last().expect("samples")[process];
        assert!(after.1 <= before.1 + 4, "descriptors: {samples:?}");
        assert!(after.0 <= before.0 + 2048, "resident KiB: {samples:?}");
    }
}

/// So many guests one after the other, and the processes they were in.
async fn cycle(pool: Pool, cycles: usize) -> BTreeSet<u32> {
    let mut processes = BTreeSet::new();
    for _ in 0..cycles {
        let vm = pool.acquire().await.expect("a machine");
        processes.insert(vm.monitor_id());
        assert_eq!(sh(&vm, "echo $((6 * 7))").await, "42");
        vm.release();
    }
    processes
}

/// How much memory a process has resident, in KiB, what it shares with others left aside.
fn rss_kib(process: u32) -> u64 {
    let statm = std::fs::read_to_string(format!("/proc/{process}/statm")).expect("it lives");
    let pages: Vec<u64> = statm.split(' ').filter_map(|count| count.trim().parse().ok()).collect();
    (pages[1] - pages[2]) * 4
}

/// How a command ends that takes so many MiB of memory, as a shell would report it.
async fn takes(vm: &Vm, mib: u32) -> u8 {
    let mib = mib.to_string();
    vm.exec(["/probe", "touch", mib.as_str()]).output().await.expect("it runs").status.shell_code()
}

/// An image with a program that takes memory, and two vCPUs.
async fn roomy() -> Image {
    let image = debian_with_probe().expect("the image");
    library::image(&image).vcpus(2).build().await.expect("an image")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pool_bounds_what_its_machines_have() {
    let image = roomy().await;
    let pool = image.pool().memory_mib(16).vcpus(1).min(1).max(1).shells(0).build();
    for round in ["a machine of the pool", "its next owner"] {
        let vm = pool.acquire().await.expect("a machine");
        let bounds = "nproc; cat /sys/fs/cgroup/memory.max /proc/self/cgroup";
        assert_eq!(sh(&vm, bounds).await, "1\n16777216\n0::/", "{round}");
        assert_eq!(takes(&vm, 4).await, 0, "{round}");
        assert_eq!(takes(&vm, 24).await, 137, "{round}");
        assert_eq!(sh(&vm, "echo alive").await, "alive", "{round}");
        vm.release();
    }
    let stats = until(&pool, |stats| stats.idle == 1).await;
    assert_eq!((stats.recycled, stats.failed), (2, 0), "{stats:?}");
    // The image is as large as it was to everybody else.
    let vm = image.pool().min(0).build().acquire().await.expect("a machine");
    assert_eq!(sh(&vm, "nproc; cat /sys/fs/cgroup/memory.max").await, "2\nmax");
    assert_eq!(takes(&vm, 24).await, 0);
}

/// Tries whatever root may take for means to more than it was given, and says what worked.
const LIFT: &str = r"
lift() {
    for value in 134217728 max; do echo $value > $1/memory.max && echo memory by $1; done
    echo 0-1 > $1/cpuset.cpus && echo vCPUs by $1
    for value in -memory -cpuset; do echo $value > $1/cgroup.subtree_control && test $1 != $2 && echo $value by $1; done
} 2>/dev/null
own=/sys/fs/cgroup
lift $own $own
lift $own/.. $own
mkdir -p /tmp/anew $own/nested
if mount -t cgroup2 anew /tmp/anew 2>/dev/null; then
    echo mounted
    for group in $(find /tmp/anew -type d); do lift $group /tmp/anew; done
fi
for group in $(ls -d $own/*/); do echo own $group; done
echo $$ > $own/nested/cgroup.procs && lift $own $own
true
";

#[tokio::test(flavor = "multi_thread")]
async fn root_of_a_machine_cannot_lift_its_bounds() {
    let image = roomy().await;
    let pool = image.pool().memory_mib(16).vcpus(1).min(1).max(1).shells(0).build();
    let vm = pool.acquire().await.expect("a machine");
    assert_eq!(sh(&vm, LIFT).await, "own /sys/fs/cgroup/nested/", "nothing works, and nothing else is there");
    for script in ["exec", "echo $$ > /sys/fs/cgroup/nested/cgroup.procs; exec"] {
        let script = format!("{script} unshare --user --map-root-user --mount --cgroup sh -c '{LIFT}'");
        // In a group below, root can change what programs read of their bounds, and not what holds them.
        let worked = sh(&vm, &script).await;
        assert!(worked.lines().any(|line| line == "mounted"), "{worked}");
        assert_eq!(sh(&vm, "nproc").await, "1");
        assert_eq!(takes(&vm, 24).await, 137);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_divide_what_they_have_among_groups_of_their_own() {
    let image = roomy().await;
    let vm = image.pool().memory_mib(16).min(0).build().acquire().await.expect("a machine");
    let divide = r"
cd /sys/fs/cgroup && mkdir small && echo $$ > small/cgroup.procs && echo '+memory +cpuset +pids' > cgroup.subtree_control
echo 8388608 > small/memory.max && cat small/memory.max && exec /probe touch 12";
    let killed = vm.exec(["sh", "-c", divide]).output().await.expect("a shell");
    assert_eq!(
        (killed.stdout.as_slice(), killed.status.shell_code()),
        (&b"8388608\n"[..], 137),
        "{killed:?}"
    );
    // Where a group is divided nobody is beside the parts, so commands have another one.
    assert_eq!(takes(&vm, 10).await, 0);
    assert_eq!(takes(&vm, 24).await, 137);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pool_of_more_than_the_image_has_is_refused() {
    let image = image().await;
    for (builder, message, hint) in [
        (
            image.pool().memory_mib(257),
            "257 MiB of memory for machines of an image that was built with 256, where 8 is the least",
            true,
        ),
        (
            image.pool().memory_mib(7),
            "7 MiB of memory for machines of an image that was built with 256, where 8 is the least",
            false,
        ),
        (
            image.pool().vcpus(2),
            "2 vCPUs for machines of an image that was built with 1, where 1 is the least",
            true,
        ),
        (
            image.pool().vcpus(0),
            "0 vCPUs for machines of an image that was built with 1, where 1 is the least",
            false,
        ),
    ] {
        let pool = builder.build();
        let error = pool.acquire().await.expect_err("no such machine");
        assert_eq!((error.to_string().as_str(), error.hint().is_some()), (message, hint));
        assert_eq!(error.blame(), kiln::Blame::Caller);
        assert_eq!(pool.stats(), PoolStats::default(), "nothing is made");
    }
    let vm = image.pool().memory_mib(256).vcpus(1).build().acquire().await.expect("all that there is");
    assert_eq!(sh(&vm, "cat /sys/fs/cgroup/memory.max").await, "max");
}
