//! Sizes, times, names and places as users write them.

use std::path::PathBuf;
use std::time::Duration;

use kiln::MEMORY_MIN_MIB;

/// Guest memory in MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MemoryMib(pub(crate) u32);

/// Reads a size: a number with an optional unit b, k, m, g or t (also KiB, MB ...), powers of 1024 as Docker's.
pub(crate) fn bytes(text: &str) -> Result<u64, String> {
    let lower = text.trim().to_ascii_lowercase();
    let digits = lower.find(|character: char| !character.is_ascii_digit()).unwrap_or(lower.len());
    let (number, unit) = lower.split_at(digits);
    let number: u64 = number.parse().map_err(|_| "expected a size such as 512m or 1g".to_owned())?;
    let shift = match unit.trim_start() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        other => return Err(format!("unknown unit '{other}': use b, k, m, g or t")),
    };
    number.checked_mul(1 << shift).ok_or_else(|| "larger than any memory".to_owned())
}

/// Reads a size of guest memory. A bare number is refused: it would be bytes to Docker and is never meant so.
pub(crate) fn memory(text: &str) -> Result<MemoryMib, String> {
    let size = bytes(text)?;
    if text.trim().bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(format!("a unit is missing: did you mean {text}m?"));
    }
    let mib = u32::try_from(size.div_ceil(1 << 20)).map_err(|_| "larger than any memory".to_owned())?;
    if mib < MEMORY_MIN_MIB {
        return Err(format!("a guest needs {MEMORY_MIN_MIB}m or more"));
    }
    Ok(MemoryMib(mib))
}

/// Reads a time: seconds as a bare number, or numbers with units ms, s, m, h.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    const FORM: &str = "expected a time such as 30s, 5m or 1h30m";
    let text = text.trim();
    if let Ok(seconds) = text.parse::<u64>() {
        return nonzero(Duration::from_secs(seconds));
    }
    let mut total = Duration::ZERO;
    let mut rest = text;
    while !rest.is_empty() {
        let digits = rest.find(|character: char| !character.is_ascii_digit()).ok_or(FORM)?;
        let (number, tail) = rest.split_at(digits);
        let number: u64 = number.parse().map_err(|_| FORM.to_owned())?;
        let letters = tail.find(|character: char| character.is_ascii_digit()).unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(letters);
        let part = match unit {
            "ms" => Some(Duration::from_millis(number)),
            "s" => Some(Duration::from_secs(number)),
            "m" => number.checked_mul(60).map(Duration::from_secs),
            "h" => number.checked_mul(3600).map(Duration::from_secs),
            other => return Err(format!("unknown unit '{other}': use ms, s, m or h")),
        };
        total = part.and_then(|part| total.checked_add(part)).ok_or("longer than any wait")?;
        rest = tail;
    }
    nonzero(total)
}

fn nonzero(duration: Duration) -> Result<Duration, String> {
    if duration.is_zero() { Err("a time above zero is needed".to_owned()) } else { Ok(duration) }
}

/// Reads a host name. RFC 1123 §2.1 "Host Names and Numbers"; Linux has room for 64 bytes.
pub(crate) fn hostname(text: &str) -> Result<String, String> {
    let label = |label: &str| {
        !label.is_empty()
            && label.len() <= 63
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
    };
    if text.len() > 64 || !text.split('.').all(label) {
        return Err("a host name has letters, digits, '-' and '.', and at most 64 of them".to_owned());
    }
    Ok(text.to_owned())
}

/// Reads the name of a VM.
pub(crate) fn vm_name(text: &str) -> Result<String, String> {
    if kiln::detached::is_vm_name(text) {
        return Ok(text.to_owned());
    }
    Err("a name begins with a letter or digit, has letters, digits and -_., and at most 63 of them"
        .to_owned())
}

/// How many lines of something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lines {
    /// All there are.
    All,
    /// The last of them.
    Last(u64),
}

/// Reads a number of lines.
pub(crate) fn lines(text: &str) -> Result<Lines, String> {
    match text {
        "all" => Ok(Lines::All),
        _ => text.parse().map(Lines::Last).map_err(|_| "expected a number, or 'all'".to_owned()),
    }
}

/// Reads a signal.
pub(crate) fn signal(text: &str) -> Result<u8, String> {
    kiln::signal::number(text).ok_or_else(|| "expected a signal such as TERM, SIGHUP or 10".to_owned())
}

/// Reads the name of a snapshot.
pub(crate) fn snapshot_name(text: &str) -> Result<String, String> {
    if kiln::store::is_snapshot_name(text) {
        return Ok(text.to_owned());
    }
    Err("a name begins with a letter or digit, has letters, digits and -_.:/, and does not look like a key"
        .to_owned())
}

/// Reads where a file is and where it goes: HOST:GUEST, cut at the last ':' before a '/'.
pub(crate) fn extra_file(text: &str) -> Result<(PathBuf, String), String> {
    let (host, guest) = text
        .rsplit_once(":/")
        .filter(|(host, _)| !host.is_empty())
        .ok_or("expected HOST:GUEST, such as ./app.conf:/etc/app.conf, where GUEST begins with '/'")?;
    Ok((host.into(), guest_path(&format!("/{guest}"))?))
}

/// Reads the path of a file in the guest.
pub(crate) fn guest_path(text: &str) -> Result<String, String> {
    if !text.starts_with('/') {
        return Err("a path in the guest begins with '/'".to_owned());
    }
    if text.ends_with('/') {
        return Err("a file is named, and not a directory: leave the last '/' out".to_owned());
    }
    Ok(text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_dockers() {
        assert_eq!(bytes("512m"), Ok(512 << 20));
        assert_eq!(bytes("1G"), Ok(1 << 30));
        assert_eq!(bytes("2KiB"), Ok(2048));
        assert_eq!(bytes("7"), Ok(7));
        assert!(bytes("").is_err());
        assert!(bytes("m").is_err());
        assert!(bytes("-1m").is_err());
        assert!(bytes("1x").is_err());
        assert!(bytes("18446744073709551615k").is_err());
    }

    #[test]
    fn memory_without_a_unit_is_asked_about() {
        assert_eq!(memory("512M"), Ok(MemoryMib(512)));
        assert_eq!(memory("8g"), Ok(MemoryMib(8192)));
        assert_eq!(memory("65537k"), Ok(MemoryMib(65)));
        assert!(memory("512").is_err_and(|error| error.contains("512m")));
    }

    #[test]
    fn memory_too_small_names_the_least() {
        assert!(memory("63m").is_err_and(|error| error.contains("64m")));
        assert!(memory("0m").is_err());
    }

    #[test]
    fn times_add_up() {
        assert_eq!(duration("30"), Ok(Duration::from_secs(30)));
        assert_eq!(duration("1h30m"), Ok(Duration::from_mins(90)));
        assert_eq!(duration("1500ms"), Ok(Duration::from_millis(1500)));
        for wrong in ["", "0", "0s", "s", "5x", "1h30", "99999999999999999999h", "18446744073709551615h"] {
            assert!(duration(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_file_goes_from_a_path_here_to_one_in_the_guest() {
        let to = |host: &str, guest: &str| Ok((PathBuf::from(host), guest.to_owned()));
        assert_eq!(extra_file("a.conf:/etc/a"), to("a.conf", "/etc/a"));
        assert_eq!(extra_file("/x:y:/z"), to("/x:y", "/z"));
        assert_eq!(extra_file("/x:/y:z"), to("/x", "/y:z"));
        for wrong in ["", "a", "a:b", ":/b", "a:/b/", "a:/"] {
            assert!(extra_file(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn host_names_have_no_room_for_tricks() {
        assert!(hostname("web-1.example").is_ok());
        for wrong in ["", "-a", "a..b", "a b", "a/b", &"x".repeat(65)] {
            assert!(hostname(wrong).is_err(), "{wrong}");
        }
    }
}
