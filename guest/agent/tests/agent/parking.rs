//! Parking, and going on as the same guest or as another.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;

use kiln_agent::power::Power;
use kiln_agent::server::Fault;
use kiln_protocol::mailbox::{Bounds, ENTROPY_AT, ENTROPY_BYTES, GENERATION_BYTES, Generation};
use kiln_protocol::{
    Became, Become, Call, Done, Exec, Hello, Outcome, Park, PowerOff, Reason, Setup, Started, power,
};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};

use crate::guest::{Guest, Stream, exec, make_root, own_mounts, sh};
use crate::machine::{Machine, call_at_port, generation, park_at_port, tell_at_port};
use crate::setup::Booted;

/// Counts in a file as fast as it can, and answers what it is sent.
const COUNTER: &str =
    "while :; do echo >> /host/count; done & while read line; do echo got $line; done; kill $!";

fn guest_on(power: impl FnOnce() -> Power + Send + 'static) -> Guest {
    Guest::begin_on(power, own_mounts, make_root, || {})
}

/// A guest on a machine, which goes first: a parked agent waits for it.
fn machine(reaper: bool) -> (Guest, Machine) {
    let (machine, power) = Machine::new();
    (guest_on(power).ready(reaper), machine)
}

fn counter(guest: &Guest) -> Stream {
    let mut stream = guest.start(Exec { stdin: true, ..sh(COUNTER) });
    assert_answers(&mut stream);
    stream
}

fn assert_answers(stream: &mut Stream) {
    stream.stdin(b"x\n");
    stream.read_until("got x");
}

fn count(guest: &Guest) -> u64 {
    std::fs::metadata(guest.shared("count")).map_or(0, |file| file.len())
}

/// Counts 100,000 times itself: by then, whoever can count has counted.
fn count_elsewhere(guest: &Guest) {
    let script = "i=0; while [ $i -lt 100000 ]; do i=$((i+1)); echo >> elsewhere; done";
    let status = Command::new("/bin/sh").args(["-c", script]).current_dir(guest.shared("")).status();
    assert!(status.expect("a shell").success());
}

/// A generation whose host name is none.
fn bad_generation() -> Generation {
    Generation { hostname: "no name".into(), ..generation(1) }
}

/// A generation that bounds processes by what no machine has.
fn boundless_generation() -> Generation {
    Generation { bounds: Bounds { vcpus: u32::MAX, memory_mib: 0 }, ..generation(1) }
}

#[test]
fn processes_stand_still_while_parked_and_go_on_without_mail() {
    for reaper in [false, true] {
        let (guest, mut machine) = machine(reaper);
        let mut stream = counter(&guest);
        machine.park(&guest);
        let before = count(&guest);
        count_elsewhere(&guest);
        assert_eq!(count(&guest), before);
        machine.go_on();
        assert_answers(&mut stream);
        count_elsewhere(&guest);
        assert_ne!(count(&guest), before);
    }
}

#[test]
fn mail_is_acknowledged_and_its_entropy_wiped_before_anything_else() {
    let (guest, mut machine) = machine(false);
    let mut stream = counter(&guest);
    machine.park(&guest);
    let before = count(&guest);
    machine.deliver(&generation(1));
    machine.go_on();
    assert_eq!(machine.heard(), power::PHASE_RESUMED);
    assert_eq!(machine.acknowledged(), [1; 16]);
    assert_eq!(machine.mail()[ENTROPY_AT..][..ENTROPY_BYTES], [0; ENTROPY_BYTES]);
    machine.go_on();
    assert_eq!(machine.heard(), power::PHASE_ADOPTED);
    assert_eq!(count(&guest), before, "a process ran before the guest was its new self");
    machine.go_on();
    assert_answers(&mut stream);
}

#[test]
fn mail_taken_before_is_no_mail() {
    let (guest, mut machine) = machine(false);
    machine.restore(&guest, &generation(1));
    machine.park(&guest);
    machine.go_on();
    assert_eq!(guest.sh("echo $HOSTNAME; hostname").text(), "box-1\nbox-1\n");
}

#[test]
fn with_bad_mail_no_process_goes_on() {
    for bad in [bad_generation(), boundless_generation()] {
        let (mut guest, mut machine) = machine(true);
        let _stream = counter(&guest);
        machine.park(&guest);
        let before = count(&guest);
        machine.deliver(&bad);
        machine.go_on();
        assert_eq!(machine.heard(), power::PHASE_RESUMED);
        machine.go_on();
        match guest.join() {
            Err(fault @ Fault::NotAdopted(_)) => assert_eq!(fault.notice(), power::NOTICE_NOT_ADOPTED),
            other => panic!("{other:?}"),
        }
        assert_eq!(count(&guest), before);
    }
}

#[test]
fn the_connections_of_running_commands_stay_and_all_others_are_closed() {
    let (guest, mut machine) = machine(true);
    let mut stream = counter(&guest);
    let mut idle = guest.connect();
    // Accepted, since one that came later has been answered.
    guest.sh("true");
    let mut asked = machine.park(&guest);
    assert_eq!((idle.frame(), asked.frame()), (None, None));
    machine.deliver(&generation(1));
    for _ in [power::PHASE_RESUMED, power::PHASE_ADOPTED] {
        machine.go_on();
        machine.heard();
    }
    machine.go_on();
    assert_answers(&mut stream);
}

#[test]
fn a_command_outlives_the_connection_of_an_earlier_life() {
    for reaper in [false, true] {
        let (guest, mut machine) = machine(reaper);
        let script = "while :; do echo; echo >> /host/count; done";
        let mut stream = guest.start(sh(script));
        stream.read_until("\n");
        machine.restore(&guest, &generation(1));
        drop(stream);
        // It writes more than any pipe holds.
        guest
            .sh("c=$(wc -l < /host/count); while [ $(wc -l < /host/count) -lt $((c + 100000)) ]; do :; done")
            .text();
        // One of this life does not.
        let mut stream = guest.start(exec(["flock", "/tmp/lock", "sh", "-c", "echo ready; sleep 1000"]));
        stream.read_until("ready");
        drop(stream);
        assert_eq!(guest.sh("flock /tmp/lock echo free").text(), "free\n");
    }
}

#[test]
fn without_a_doorbell_a_parked_guest_hears_nothing_but_who_it_is() {
    for reaper in [false, true] {
        let guest = Guest::bare().ready(reaper);
        let mut running = counter(&guest);
        let mut idle = guest.connect();
        guest.call(Call::Hello(Hello {}));
        park_at_port(&guest);
        let before = count(&guest);
        assert_eq!(idle.frame(), None);
        for call in [
            Call::Hello(Hello {}),
            Call::Park(Park {}),
            Call::PowerOff(PowerOff::default()),
            Call::Exec(sh("echo >> /host/count")),
            Call::Become(Become { generation: Some(Vec::new()) }),
            Call::Become(Become { generation: Some(vec![1; GENERATION_BYTES + 1]) }),
            // More than it takes in.
            Call::Become(Become { generation: Some(vec![1; 1 << 16]) }),
        ] {
            let mut stream = call_at_port(&guest);
            // It may hang up before it has all of it.
            let _ = stream.try_request(call);
            assert_eq!(stream.frame(), None);
        }
        // One that says nothing and hangs up.
        drop(call_at_port(&guest));
        count_elsewhere(&guest);
        assert_eq!(count(&guest), before);
        assert_eq!(tell_at_port(&guest, None), Some(Outcome::Done(Done {})));
        assert_answers(&mut running);
        assert_eq!(guest.sh("echo $HOSTNAME").text(), "box\n");
    }
}

#[test]
fn without_a_doorbell_a_guest_becomes_another_before_any_process_goes_on() {
    let guest = Guest::bare().ready(true);
    for number in 1..4 {
        let mut running = counter(&guest);
        park_at_port(&guest);
        let before = count(&guest);
        let became = tell_at_port(&guest, Some(generation(number).encode().to_vec()));
        assert_eq!(became, Some(Outcome::Became(Became { id: vec![number; 16] })));
        let name = format!("box-{number}\n");
        assert_eq!(guest.sh("hostname").text(), name);
        assert_answers(&mut running);
        let Outcome::Welcome(welcome) = guest.call(Call::Hello(Hello {})) else { panic!("no welcome") };
        assert_eq!(welcome.generation, u64::from(number));
        count_elsewhere(&guest);
        assert_ne!(count(&guest), before);
    }
}

#[test]
fn without_a_doorbell_a_guest_that_cannot_become_another_ends() {
    for bad in [bad_generation(), boundless_generation(), Generation { id: [0; 16], ..generation(1) }] {
        let mut guest = Guest::bare().ready(true);
        let _running = counter(&guest);
        park_at_port(&guest);
        let before = count(&guest);
        assert_eq!(tell_at_port(&guest, Some(bad.encode().to_vec())), None);
        assert!(matches!(guest.join(), Err(Fault::NotAdopted(_))));
        assert_eq!(count(&guest), before);
    }
}

#[test]
fn who_is_not_parked_is_not_told_who_it_is() {
    let guest = Guest::new();
    for generation in [None, Some(generation(1).encode().to_vec())] {
        let outcome = guest.call(Call::Become(Become { generation }));
        assert!(
            matches!(&outcome, Outcome::Failed(failed) if failed.reason() == Reason::Invalid),
            "{outcome:?}"
        );
    }
    assert_eq!(guest.sh("echo $HOSTNAME").text(), "box\n");
}

#[test]
fn a_warm_up_is_alone_and_the_first_command_is_still_process_1() {
    let (guest, mut machine) = machine(false);
    for _ in 0..2 {
        let (stream, outcome) = guest
            .try_start(Exec { warmup: true, ..sh("sleep 1000 & echo $$; ls -d /proc/[0-9]* | head -1") });
        assert_eq!(outcome, Outcome::Started(Started { pid: 1 }));
        assert_eq!(stream.finish().text(), "1\n/proc/1\n");
    }
    machine.restore(&guest, &generation(1));
    let (mut stream, outcome) = guest.try_start(Exec {
        stdin: true,
        ..sh("echo $$; ls -d /proc/[0-9]*; grep -c ' /proc ' /proc/mounts; read line")
    });
    assert_eq!(outcome, Outcome::Started(Started { pid: 1 }));
    assert_eq!(stream.read_until("/proc/1\n1\n"), "1\n/proc/1\n1\n");
    assert_eq!(guest.refusal(Exec { warmup: true, ..sh("true") }).0, Reason::Invalid);
    stream.stdin(b"\n");
    stream.finish();
    assert_eq!(guest.refusal(sh("true")).0, Reason::Invalid);
}

#[test]
fn nothing_is_started_beside_a_warm_up() {
    let guest = Guest::new();
    let mut warmup = guest.start(Exec { warmup: true, stdin: true, ..sh("echo ready; read line") });
    warmup.read_until("ready");
    for warmup in [false, true] {
        let (reason, message) = guest.refusal(Exec { warmup, ..sh("true") });
        assert_eq!(reason, Reason::Invalid);
        assert!(message.contains("warm-up"), "{message}");
    }
    warmup.stdin(b"\n");
    warmup.finish();
    guest.sh("true").text();
}

#[test]
fn a_restored_guest_has_its_new_names_everywhere_and_running_processes_see_them() {
    const SHOW: &str = "hostname; cat /etc/hostname /etc/machine-id /proc/sys/kernel/random/boot_id /run/kiln/generation; tail -1 /etc/hosts";
    let names = |number: u8, counter: u32, hostname: &str| {
        let hex = |byte: u8| format!("{byte:02x}").repeat(16);
        let uuid = |byte: u8| {
            let hex = hex(byte);
            format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
        };
        let (machine, boot) = (hex(number | 0x40), uuid(number | 0x20));
        format!(
            "{hostname}\n{hostname}\n{machine}\n{boot}\n{counter} {}\n127.0.1.1\t{hostname}\n",
            uuid(number)
        )
    };
    for read_only in [false, true] {
        let (machine, power) = Machine::new();
        let booted = Booted::begin(power, |tree| {
            std::fs::write(tree.join("etc/machine-id"), "the image's\n").expect("a file");
        });
        let booted = booted.set_up(Setup { read_only, reaper: true, ..Setup::default() });
        let mut machine = machine;
        let script = format!("while read line; do {SHOW}; done");
        let env = vec![b"PATH=/bin".to_vec()];
        let mut running = booted.guest.start(Exec { stdin: true, env, ..sh(&script) });

        let cold = booted.sh("cat /run/kiln/generation /etc/machine-id /proc/sys/kernel/random/boot_id");
        let lengths: Vec<usize> = cold.lines().map(str::len).collect();
        assert_eq!(lengths, [38, 32, 36], "{cold}");
        assert!(cold.starts_with("0 "), "{cold}");

        let long = "a".repeat(60);
        for (number, hostname) in [(1, "box-1"), (2, long.as_str()), (3, "b")] {
            machine.restore(&booted.guest, &Generation { hostname: hostname.into(), ..generation(number) });
            let wanted = names(number, number.into(), hostname);
            assert_eq!(booted.sh(SHOW), wanted);
            running.stdin(b"\n");
            assert_eq!(running.read_until(&format!("127.0.1.1\t{hostname}\n")), wanted);
            assert_eq!(booted.sh("echo $HOSTNAME"), format!("{hostname}\n"));
        }
        assert!(booted.sh("echo x > /run/kiln/generation").contains("ead-only"));
    }
}

#[test]
fn two_boots_have_no_id_in_common() {
    let ids = || {
        let booted = Booted::from_image(Setup::default(), |tree| {
            std::fs::write(tree.join("etc/machine-id"), "").expect("a file");
        });
        booted.sh("cut -d' ' -f2 /run/kiln/generation; cat /etc/machine-id /proc/sys/kernel/random/boot_id")
    };
    let (one, other) = (ids(), ids());
    assert_eq!((one.lines().count(), other.lines().count()), (3, 3), "{one}{other}");
    assert!(one.lines().all(|id| !other.contains(id)), "{one}{other}");
}

#[test]
fn an_image_without_machine_id_gets_none() {
    let booted = Booted::from_image(Setup::default(), |_| {});
    assert_eq!(booted.sh("ls /etc/machine-id 2>/dev/null"), "");
}

#[test]
fn a_guest_restored_before_its_set_up_has_the_names_of_its_mail() {
    let (machine, power) = Machine::new();
    let booted = Booted::begin(power, |_| {});
    let mut machine = machine;
    machine.restore(&booted.guest, &generation(1));
    let booted = booted.set_up(Setup { reaper: true, ..Setup::default() });
    let _machine = machine;
    assert_eq!(booted.sh("cat /run/kiln/generation"), "1 01010101-0101-0101-0101-010101010101\n");
}

#[test]
fn the_clock_is_set_to_when_the_guest_went_on() {
    let (guest, mut machine) = machine(false);
    machine.park(&guest);
    // Tells when somebody sets the clock; that it is right now already is no matter.
    let timer = timerfd_create(TimerfdClockId::Realtime, TimerfdFlags::NONBLOCK).expect("a timer");
    let never = Timespec { tv_sec: 0, tv_nsec: 0 };
    let far = Itimerspec {
        it_interval: never,
        it_value: Timespec { tv_sec: i64::MAX / 2_000_000_000, tv_nsec: 0 },
    };
    timerfd_settime(&timer, TimerfdTimerFlags::ABSTIME | TimerfdTimerFlags::CANCEL_ON_SET, &far)
        .expect("a timer");
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970");
    machine.deliver(&Generation { realtime_ns: now.as_nanos() as u64, ..generation(1) });
    machine.go_on();
    machine.heard();
    machine.go_on();
    machine.heard();
    let set = rustix::io::read(&timer, &mut [0; 8]);
    assert_eq!(set, Err(rustix::io::Errno::CANCELED));
    machine.go_on();
}

/// Puts hooks into an image.
fn hooks(tree: &Path, hooks: &[(&str, u32, &str)]) {
    let directory = tree.join("etc/kiln/on-restore.d");
    std::fs::create_dir_all(&directory).expect("a directory");
    for (name, mode, script) in hooks {
        let path = directory.join(name);
        std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).expect("a file");
        std::fs::set_permissions(&path, Permissions::from_mode(*mode)).expect("a file");
    }
}

#[test]
fn hooks_run_in_order_before_processes_go_on_and_end_with_what_they_started() {
    for reaper in [true, false] {
        let (machine, power) = Machine::new();
        let booted = Booted::begin(power, |tree| {
            hooks(
                tree,
                &[
                    (
                        "20-second",
                        0o755,
                        "sleep 1000 & echo second $(id -u) $(hostname) $HOSTNAME >> /home/log",
                    ),
                    ("10-first", 0o755, "echo first $1 $2 >> /home/log; exit 3"),
                    ("30-no-program", 0o644, "echo third >> /home/log"),
                    ("40-no-interpreter", 0o755, ""),
                ],
            );
            std::fs::write(tree.join("etc/kiln/on-restore.d/40-no-interpreter"), "#!/no/such\n")
                .expect("a file");
        });
        let booted = booted.set_up(Setup { reaper, ..Setup::default() });
        let mut machine = machine;
        let script = "while read line; do cat /home/log; echo end; done";
        let running = || {
            let env = vec![b"PATH=/bin".to_vec()];
            booted.guest.start(Exec { stdin: true, env, ..sh(script) })
        };
        let wanted = "first 1 01010101-0101-0101-0101-010101010101\nsecond 0 box-1 box-1\nend\n";
        let mut before = reaper.then(running);
        machine.restore(&booted.guest, &generation(1));
        let mut after = running();
        for stream in before.iter_mut().chain([&mut after]) {
            stream.stdin(b"\n");
            assert_eq!(stream.read_until("end\n"), wanted);
        }
        assert_eq!(booted.sh("pidof sleep || echo none"), "none\n");
    }
}
