//! Stdin, stdout and stderr, byte for byte, with bounded memory.

use std::process::Command;

use kiln_tests::{Session, busybox, descendants, is_hardware_style, kiln_run, rss_bytes, script};

/// `size` bytes of the probe's pattern.
fn pattern(size: usize) -> Vec<u8> {
    (0..size).map(|at| (at % 251) as u8).collect()
}

#[test]
fn stdout_and_stderr_are_apart_and_binary() {
    let outcome =
        script(&[], "/probe pattern 700001; /probe pattern 3001 >&2; printf '\\0\\377\\r\\n'; exit 7");
    outcome.code(7);
    let mut stdout = pattern(700_001);
    stdout.extend_from_slice(b"\0\xff\r\n");
    assert!(outcome.stdout == stdout, "{} bytes of stdout differ", outcome.stdout.len());
    assert!(outcome.stderr == pattern(3001), "{} bytes of stderr differ", outcome.stderr.len());
}

#[test]
fn a_command_without_interactive_reads_an_empty_stdin() {
    script(&[], "/probe count").prints("0 bytes, checksum 14695981039346656037\n");
}

/// The command answers while its stdin is still open, then gets many times what any buffer holds, then its end.
#[test]
fn stdin_and_stdout_are_piped_both_ways() {
    let command = "read -r line; echo \"got $line\"; exec /probe count";
    let mut session = Session::start(&mut kiln_run(&["-i"], &busybox(), &["sh", "-c", command]));
    session.write(b"hello\n");
    session.wait_for("got hello");
    let bulk = pattern(3_000_000);
    session.write(&bulk);
    session.close_stdin();
    let outcome = session.finish();
    outcome.code(0);
    let mut local =
        Session::start(Command::new(kiln_testkit::image::probe().expect("the probe")).arg("count"));
    local.write(&bulk);
    assert_eq!(outcome.out(), local.finish().out());
}

/// A reader that goes away ends the command, as it does for a local process.
#[test]
fn a_command_whose_reader_is_gone_ends() {
    let mut shell = Command::new("sh");
    shell.args(["-c", "\"$@\" | head -c 1000 | wc -c", "sh"]);
    let kiln = kiln_run(&["--timeout", "300s"], &busybox(), &["/probe", "pattern", "999999999999"]);
    shell.arg(kiln.get_program()).args(kiln.get_args());
    shell.env("KILN_ROOT", kiln_tests::store());
    let outcome = kiln_tests::Outcome::of(&mut shell);
    assert_eq!(outcome.out().trim(), "1000", "{}", outcome.err());
}

/// The reader takes nothing for as long as a guest could fill any buffer; the bytes then wait in the guest and not in the
/// host. A guest whose kernel is emulated writes about a MiB a second, so there it is less.
#[test]
fn much_output_into_a_slow_reader_keeps_memory_bounded() {
    const GROWTH_MAX_MIB: u64 = 16;
    let size = if is_hardware_style() { 1 << 30 } else { 32 << 20 };
    let command = format!("echo ready >&2; /probe pattern {size} & sleep 30; echo stuck >&2; wait $!");
    let mut session =
        Session::start(&mut kiln_run(&["--memory", "128m"], &busybox(), &["sh", "-c", &command]));
    session.wait_for_error("ready");
    let before = resident_mib(&session);
    session.wait_for_error("stuck");
    let mut most = resident_mib(&session);
    let period = pattern(251 * 4096);
    let mut buffer = vec![0; period.len()];
    let mut left = size;
    while left > 0 {
        let now = left.min(buffer.len());
        session.read_exact(&mut buffer[..now]);
        assert!(buffer[..now] == period[..now], "output differs {left} bytes before its end");
        left -= now;
        most = most.max(resident_mib(&session));
    }
    session.finish().code(0);
    assert!(most - before < GROWTH_MAX_MIB, "{before} MiB resident became {most}");
}

/// The memory of `kiln` and its monitor.
fn resident_mib(session: &Session) -> u64 {
    let all = descendants(session.pid()).into_iter().chain([session.pid()]);
    all.map(rss_bytes).sum::<u64>() >> 20
}
