//! Commands on a terminal.

use kiln_protocol::frame::{Kind, append_message};
use kiln_protocol::{Exec, WindowSize};
use std::io::Write as _;

use crate::guest::{Guest, Stream, sh};

fn on_terminal(script: &str) -> Exec {
    Exec { tty: Some(WindowSize { rows: 33, columns: 99 }), stdin: true, ..sh(script) }
}

fn resize(stream: &mut Stream, rows: u32, columns: u32) {
    let mut bytes = vec![];
    append_message(&mut bytes, Kind::Resize, &WindowSize { rows, columns });
    stream.socket.write_all(&bytes).expect("the agent takes a frame");
}

#[test]
fn a_terminal_has_the_size_asked_for_and_is_the_commands_own() {
    let finished = Guest::new().run(on_terminal(
        "stty size; tty; echo $TERM; echo to-tty > /dev/pts/0; tty -s < /proc/self/fd/2 && echo err",
    ));
    assert_eq!(finished.text(), "33 99\r\n/dev/pts/0\r\nxterm\r\nto-tty\r\nerr\r\n");
}

#[test]
fn a_resize_is_told_to_the_command() {
    let guest = Guest::new();
    let mut stream =
        guest.start(on_terminal("trap 'stty size; exit' WINCH; echo ready; while :; do sleep 0.1; done"));
    stream.read_until("ready");
    resize(&mut stream, 50, 132);
    assert_eq!(stream.finish().text(), "50 132\r\n");
}

#[test]
fn control_c_interrupts_the_foreground() {
    let guest = Guest::with_reaper();
    // The test may have been started in the background of a shell, and so ignore SIGINT.
    let mut stream = guest.start(on_terminal("exec env --default-signal=INT cat"));
    stream.stdin(b"typed\n");
    // Once as the terminal's echo, once from the command.
    stream.read_until("typed\r\ntyped\r\n");
    stream.stdin(b"\x03");
    assert_eq!(stream.finish().exited.signal, 2);
}

#[test]
fn what_is_typed_is_read_and_the_end_of_stdin_is_control_d() {
    let guest = Guest::new();
    let mut stream = guest.start(on_terminal("stty -echo; echo ready; cat; echo over"));
    stream.read_until("ready");
    stream.stdin(b"typed\n");
    stream.send(Kind::StdinEnd, &[]);
    let finished = stream.finish();
    assert!(finished.text().ends_with("typed\r\nover\r\n"), "{finished:?}");
}

#[test]
fn everything_written_to_a_terminal_arrives_before_the_end() {
    let guest = Guest::with_reaper();
    let wanted: String = (1..=30_000).map(|number| number.to_string() + "\r\n").collect();
    for _ in 0..3 {
        assert!(guest.run(on_terminal("seq 30000")).text() == wanted);
    }
}

#[test]
fn a_background_process_on_the_terminal_is_not_waited_for() {
    let guest = Guest::with_reaper();
    let finished = guest.run(on_terminal("trap '' HUP; sleep 1000 & echo started"));
    assert_eq!(finished.text(), "started\r\n");
}

#[test]
fn a_terminal_nobody_reads_stays_and_loses_its_output() {
    let guest = Guest::new();
    let mut stream = guest.start(on_terminal("stty -echo; echo ready; read line; seq 100000; exit 4"));
    stream.read_until("ready");
    stream.send(Kind::StdoutClose, &[]);
    stream.stdin(b"go\n");
    assert_eq!(stream.finish().exited.code, 4);
}

#[test]
fn a_terminal_belongs_to_the_commands_user() {
    let guest = Guest::new();
    let finished =
        guest.run(Exec { user: "app".into(), ..on_terminal("stat -c %u $(tty); echo x > $(tty)") });
    assert_eq!(finished.text(), "1000\r\nx\r\n");
}
