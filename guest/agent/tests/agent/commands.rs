//! What a command is started as, and what keeps it from starting.

use kiln_protocol::{Exec, Reason};

use crate::guest::{Finished, Guest, exec, sh};

fn as_user(guest: &Guest, user: &str) -> String {
    let script = "echo $(id -u) $(id -g) $(id -G) $HOME";
    guest.run(Exec { user: user.into(), ..sh(script) }).text().trim().to_owned()
}

#[test]
fn a_user_gets_the_identity_the_image_gives_it() {
    let guest = Guest::with_reaper();
    assert_eq!(as_user(&guest, ""), "0 0 0 /root");
    assert_eq!(as_user(&guest, "app"), "1000 1001 1001 10 29 /home/app");
    assert_eq!(as_user(&guest, "1000"), "1000 1001 1001 10 29 /home/app");
    assert_eq!(as_user(&guest, "app:audio"), "1000 29 29 /home/app");
    assert_eq!(as_user(&guest, "4242:77"), "4242 77 77 /");
}

#[test]
fn an_unknown_user_is_refused_before_anything_starts() {
    let (reason, message) = Guest::new().refusal(Exec { user: "nobody-here".into(), ..sh("true") });
    assert_eq!(reason, Reason::Invalid);
    assert!(message.contains("nobody-here"), "{message}");
}

#[test]
fn a_hostile_passwd_file_is_nobody_and_blocks_nothing() {
    let guest = Guest::with_reaper();
    guest.sh("rm /etc/passwd; mkfifo /etc/passwd").text();
    assert_eq!(as_user(&guest, ""), "0 0 0 /");
    guest.sh("rm /etc/passwd; ln -s /dev/zero /etc/passwd").text();
    assert_eq!(as_user(&guest, "7"), "7 0 0 /");
    guest.sh("rm /etc/passwd; ln -s passwd /etc/passwd").text();
    assert_eq!(as_user(&guest, "7"), "7 0 0 /");
    guest.sh("rm /etc/passwd; truncate -s 1T /etc/passwd").text();
    assert_eq!(guest.refusal(sh("true")).0, Reason::Invalid);
}

#[test]
fn a_user_cannot_do_what_root_can() {
    let guest = Guest::new();
    let script = "grep CapEff /proc/self/status; touch /etc/x 2>/dev/null && echo written";
    let finished = guest.run(Exec { user: "app".into(), ..sh(script) });
    assert_eq!(String::from_utf8_lossy(&finished.stdout), "CapEff:\t0000000000000000\n");
}

#[test]
fn a_missing_working_directory_is_made() {
    let guest = Guest::new();
    let finished = guest.run(Exec { cwd: "/srv/deep/dir".into(), ..sh("pwd; stat -c %U:%a .") });
    assert_eq!(finished.text(), "/srv/deep/dir\nroot:755\n");
}

#[test]
fn a_working_directory_that_cannot_be_one_is_refused() {
    let guest = Guest::new();
    let (reason, message) = guest.refusal(Exec { cwd: "/etc/passwd".into(), ..sh("true") });
    assert_eq!(reason, Reason::NotExecutable);
    assert!(message.contains("/etc/passwd: not a directory"), "{message}");
}

#[test]
fn what_docker_sets_in_the_environment_is_set() {
    let guest = Guest::new();
    let bare = Exec { env: vec![], ..exec(["env"]) };
    let path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    assert_eq!(guest.run(bare).text(), format!("{path}\nHOSTNAME=box\nHOME=/root\n"));
}

#[test]
fn what_is_not_there_is_not_found() {
    let guest = Guest::new();
    let (reason, message) = guest.refusal(exec(["no-such-command"]));
    assert_eq!((reason, message.as_str()), (Reason::NotFound, "no-such-command: not found in PATH"));
    let (reason, message) = guest.refusal(exec(["/no/such/command"]));
    assert_eq!((reason, message.as_str()), (Reason::NotFound, "/no/such/command: no such file or directory"));
}

#[test]
fn what_is_no_program_is_not_executable() {
    let guest = Guest::with_reaper();
    guest.sh("echo 'echo hi' > /tmp/script; chmod 755 /tmp/script; echo x > /tmp/data").text();
    for (name, error) in [
        ("/tmp/script", "exec format error"),
        ("/tmp/data", "permission denied"),
        ("/tmp", "permission denied"),
    ] {
        let (reason, message) = guest.refusal(exec([name]));
        assert_eq!((reason, message), (Reason::NotExecutable, format!("{name}: {error}")));
    }
    let searched = Exec { env: vec![b"PATH=/nowhere:/tmp".to_vec()], ..exec(["data"]) };
    assert_eq!(guest.refusal(searched).0, Reason::NotExecutable);
}

#[test]
fn a_missing_interpreter_is_named_as_such() {
    let guest = Guest::with_reaper();
    guest.sh("printf '#!/no/such/shell\\n' > /tmp/script; chmod 755 /tmp/script").text();
    let (reason, message) = guest.refusal(exec(["/tmp/script"]));
    assert_eq!(reason, Reason::NotFound);
    assert!(message.contains("its interpreter"), "{message}");
}

#[test]
fn a_script_with_an_interpreter_runs() {
    let guest = Guest::with_reaper();
    guest.sh("printf '#!/bin/sh\\necho ran $1\\n' > /tmp/script; chmod 755 /tmp/script").text();
    assert_eq!(guest.run(exec(["/tmp/script", "well"])).text(), "ran well\n");
}

#[test]
fn a_command_refused_leaves_room_for_one_that_is_not() {
    let guest = Guest::new();
    for _ in 0..3 {
        assert_eq!(guest.refusal(exec(["no-such-command"])).0, Reason::NotFound);
    }
    assert_eq!(guest.sh("echo $$; grep -c /proc /proc/mounts").text().lines().next(), Some("1"));
}

#[test]
fn a_hundred_kilobytes_of_arguments_and_more_arrive() {
    let guest = Guest::with_reaper();
    let longest = "x".repeat(131_071);
    assert_eq!(guest.run(exec(["/bin/sh", "-c", "echo ${#1}", "sh", &longest])).text(), "131071\n");
    let mut many = sh("echo $#");
    many.argv.extend(std::iter::repeat_n(vec![b'y'; 1000], 900));
    assert_eq!(guest.run(many).text(), "899\n");
}

#[test]
fn an_argument_longer_than_the_kernel_takes_is_refused_with_the_reason() {
    let too_long = "x".repeat(131_072);
    let (reason, message) = Guest::new().refusal(exec(["/bin/echo", &too_long]));
    assert_eq!((reason, message.as_str()), (Reason::NotExecutable, "/bin/echo: argument list too long"));
}

#[test]
fn no_file_of_the_agents_is_open_in_a_command() {
    // What the test itself was started with and never chose to hand on.
    let inherited: Vec<String> = std::fs::read_dir("/proc/self/fdinfo")
        .expect("procfs")
        .map(|entry| entry.expect("procfs").path())
        .filter(|path| {
            // A descriptor may be closed by another test meanwhile.
            let info = std::fs::read_to_string(path).unwrap_or_default();
            let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap_or("0").trim();
            i64::from_str_radix(flags, 8).expect("octal") & 0o2_000_000 == 0
        })
        .filter_map(|path| Some(path.file_name()?.to_str()?.to_owned()))
        .collect();
    let guest = Guest::with_reaper();
    let _other = guest.start(Exec { stdin: true, ..sh("cat") });
    let finished: Finished = guest.run(exec(["ls", "/proc/self/fd"]));
    let open: Vec<&str> =
        finished.text().lines().filter(|fd| !inherited.iter().any(|other| other == fd)).collect();
    // One is the directory being listed.
    assert!(open.len() == 1 && finished.text().starts_with("0\n1\n"), "{open:?} of {finished:?}");
}
