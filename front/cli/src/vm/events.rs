//! `kiln events`.

use std::fmt::Write as _;

use kiln::Blame;
use kiln::detached::{Event, Machines};

use super::args::Events;
use crate::failure::Failure;
use crate::print;
use crate::terminal::printable;
use crate::when::UnixNs;

/// Prints what happens until it is interrupted.
///
/// # Errors
/// When the events cannot be read or printed.
pub(crate) async fn events(machines: &Machines, args: &Events) -> Result<(), Failure> {
    let mut reader = machines.events()?;
    let since = args.since.unwrap_or_else(|| if args.no_stream { UnixNs(0) } else { UnixNs::now() });
    let show = |event: &Event| {
        if UnixNs::from_ms(event.time_unix_ms) < since {
            return Ok(());
        }
        print(&if args.json { as_json(event)? } else { line(event) })
    };
    while let Some(event) = reader.read_next()? {
        show(&event)?;
    }
    if args.no_stream {
        return Ok(());
    }
    loop {
        show(&reader.wait().await?)?;
    }
}

fn as_json(event: &Event) -> Result<String, Failure> {
    let text = serde_json::to_string(event).map_err(|error| Failure::new(Blame::Kiln, error))?;
    Ok(text + "\n")
}

fn line(event: &Event) -> String {
    let time = UnixNs::from_ms(event.time_unix_ms).shown(3);
    let mut line = format!("{time} {} {} {}", event.event.name(), event.id, event.name);
    for (key, value) in
        [("image", &event.image)].into_iter().chain(event.details.iter().map(|(k, v)| (k.as_str(), v)))
    {
        // A string takes all that is written to it.
        let _ = write!(line, " {key}={}", quoted(value));
    }
    printable(&line) + "\n"
}

/// A value that is one word to a shell and to a reader.
fn quoted(value: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_./:@+,%".contains(&byte);
    if !value.is_empty() && value.bytes().all(plain) { value.to_owned() } else { format!("{value:?}") }
}

#[cfg(test)]
mod tests {
    use kiln::detached::Happening;

    use super::*;

    #[test]
    fn an_event_is_a_line() {
        let event = Event {
            time_unix_ms: 1_000,
            event: Happening::ExecStart,
            id: "0123456789ab".into(),
            name: "web".into(),
            image: "demo:1".into(),
            details: [("command".to_owned(), "sh -c \"x\n\u{1b}[2J\"".to_owned())].into(),
        };
        let shown = line(&event);
        assert_eq!(
            shown,
            "1970-01-01T00:00:01.000Z exec_start 0123456789ab web image=demo:1 command=\"sh -c \\\"x\\n\\u{1b}[2J\\\"\"\n"
        );
    }
}
