//! Signal numbers and names, as Linux has them on x86-64 and 64-bit ARM.

/// The polite request to end.
pub const SIGTERM: u8 = 15;

/// The first and the last signal without a meaning of its own, as the C library counts them.
const REAL_TIME: (u8, u8) = (34, 64);

const NAMES: [(&str, u8); 33] = [
    ("HUP", 1),
    ("INT", 2),
    ("QUIT", 3),
    ("ILL", 4),
    ("TRAP", 5),
    ("ABRT", 6),
    ("IOT", 6),
    ("BUS", 7),
    ("FPE", 8),
    ("KILL", 9),
    ("USR1", 10),
    ("SEGV", 11),
    ("USR2", 12),
    ("PIPE", 13),
    ("ALRM", 14),
    ("TERM", 15),
    ("STKFLT", 16),
    ("CHLD", 17),
    ("CONT", 18),
    ("STOP", 19),
    ("TSTP", 20),
    ("TTIN", 21),
    ("TTOU", 22),
    ("URG", 23),
    ("XCPU", 24),
    ("XFSZ", 25),
    ("VTALRM", 26),
    ("PROF", 27),
    ("WINCH", 28),
    ("IO", 29),
    ("POLL", 29),
    ("PWR", 30),
    ("SYS", 31),
];

/// The number of a signal given as `SIGTERM`, `TERM`, `15` or `SIGRTMIN+3`; `None` when there is no such signal.
pub fn number(text: &str) -> Option<u8> {
    if let Ok(number) = text.parse::<u8>() {
        return (1..=REAL_TIME.1).contains(&number).then_some(number);
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some(&(_, number)) = NAMES.iter().find(|(known, _)| *known == name) {
        return Some(number);
    }
    let (first, last) = REAL_TIME;
    let number = match name {
        "RTMIN" => Some(first),
        "RTMAX" => Some(last),
        _ => match (name.strip_prefix("RTMIN+"), name.strip_prefix("RTMAX-")) {
            (Some(above), _) => first.checked_add(above.parse().ok()?),
            (_, Some(below)) => last.checked_sub(below.parse().ok()?),
            _ => None,
        },
    }?;
    (first..=last).contains(&number).then_some(number)
}

/// The name of a signal, such as `SIGTERM`.
pub fn name(number: u8) -> String {
    match NAMES.iter().find(|(_, known)| *known == number) {
        Some((name, _)) => format!("SIG{name}"),
        None => format!("signal {number}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_way_to_name_a_signal_is_known() {
        for (text, expected) in [("SIGTERM", 15), ("term", 15), ("1", 1), ("RTMIN", 34), ("SIGRTMAX-1", 63)] {
            assert_eq!(number(text), Some(expected), "{text}");
        }
        for wrong in ["", "0", "65", "SIG", "RTMIN+31", "RTMAX-31", "RTMIN-1", "256"] {
            assert_eq!(number(wrong), None, "{wrong}");
        }
        assert_eq!(name(9), "SIGKILL");
        assert_eq!(name(34), "signal 34");
    }
}
