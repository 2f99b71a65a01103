//! Moments as users write and read them: RFC 3339 "Date and Time on the Internet: Timestamps", in UTC.

use std::time::{SystemTime, UNIX_EPOCH};

use crate::quantity;

const NS_PER_S: u64 = 1_000_000_000;
const S_PER_DAY: i64 = 86_400;
/// Years are counted from March of a year that four centuries divide: a leap day is the last of a year then.
const DAYS_PER_ERA: i64 = 146_097;
/// Days from the first of March of year 0 to 1970.
const DAYS_TO_1970: i64 = 719_468;

/// A moment in nanoseconds since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct UnixNs(pub(crate) u64);

impl UnixNs {
    /// This moment.
    pub(crate) fn now() -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self(u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
    }

    /// A moment in milliseconds since 1970.
    pub(crate) fn from_ms(ms: u64) -> Self {
        Self(ms.saturating_mul(1_000_000))
    }

    /// The moment with as many digits of its second as `digits`, up to nine.
    pub(crate) fn shown(self, digits: usize) -> String {
        let seconds = self.0 / NS_PER_S;
        let (days, second) = (seconds as i64 / S_PER_DAY, seconds as i64 % S_PER_DAY);
        let (year, month, day) = civil(days);
        let (hour, minute) = (second / 3600, second / 60 % 60);
        let fraction = format!("{:09}", self.0 % NS_PER_S);
        let second = second % 60;
        let fraction = &fraction[..digits.min(9)];
        let point = if fraction.is_empty() { "" } else { "." };
        format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}{point}{fraction}Z")
    }
}

/// Reads a moment, seconds since 1970, or how long ago it was.
pub(crate) fn parse(text: &str) -> Result<UnixNs, String> {
    if let Ok(seconds) = text.parse::<u64>() {
        return Ok(UnixNs(seconds.saturating_mul(NS_PER_S)));
    }
    if text.contains('-') || text.contains(':') {
        return moment(text)
            .ok_or_else(|| "expected a time such as 2026-01-31T12:00:00Z, or how long ago: 10m".to_owned());
    }
    let ago = u64::try_from(quantity::duration(text)?.as_nanos()).unwrap_or(u64::MAX);
    Ok(UnixNs(UnixNs::now().0.saturating_sub(ago)))
}

fn moment(text: &str) -> Option<UnixNs> {
    let (date, time) = text.split_once(['T', 't', ' ']).unwrap_or((text, "00:00:00Z"));
    let (time, offset_s) = zone(time)?;
    let (time, fraction) = time.split_once('.').unwrap_or((time, "0"));
    let [year, month, day] = numbers(date, '-', [4, 2, 2])?;
    let [hour, minute, second] = numbers(time, ':', [2, 2, 2])?;
    if !(1..=12).contains(&month) || day < 1 || hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    let days = days(year, month, day);
    // A day that its month does not have.
    if civil(days) != (year, month, day) || fraction.is_empty() || fraction.len() > 9 {
        return None;
    }
    let fraction: u64 = format!("{fraction:0<9}").parse().ok()?;
    let seconds = days * S_PER_DAY + hour * 3600 + minute * 60 + second - offset_s;
    let seconds = u64::try_from(seconds).ok()?;
    Some(UnixNs(seconds.checked_mul(NS_PER_S)?.checked_add(fraction)?))
}

/// Takes the zone from the end of a time; it is UTC when there is none.
fn zone(time: &str) -> Option<(&str, i64)> {
    if let Some(time) = time.strip_suffix(['Z', 'z']) {
        return Some((time, 0));
    }
    let Some(at) = time.rfind(['+', '-']) else { return Some((time, 0)) };
    let [hours, minutes] = numbers(&time[at + 1..], ':', [2, 2])?;
    let offset = hours * 3600 + minutes * 60;
    Some((&time[..at], if time[at..].starts_with('-') { -offset } else { offset }))
}

/// Numbers of so many digits each, with `between` between them.
fn numbers<const N: usize>(text: &str, between: char, digits: [usize; N]) -> Option<[i64; N]> {
    let mut words = text.split(between);
    let mut numbers = [0; N];
    for (number, digits) in numbers.iter_mut().zip(digits) {
        let word = words.next()?;
        if word.len() != digits || !word.bytes().all(|byte| byte.is_ascii_digit()) {
            return None;
        }
        *number = word.parse().ok()?;
    }
    words.next().is_none().then_some(numbers)
}

/// Days from 1970 to a date of the Gregorian calendar.
fn days(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let (era, year_of_era) = (year.div_euclid(400), year.rem_euclid(400));
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    era * DAYS_PER_ERA + day_of_era - DAYS_TO_1970
}

/// Year, month and day so many days after 1970.
fn civil(days: i64) -> (i64, i64, i64) {
    let days = days + DAYS_TO_1970;
    let (era, day_of_era) = (days.div_euclid(DAYS_PER_ERA), days.rem_euclid(DAYS_PER_ERA));
    let leap_days = day_of_era / 1460 - day_of_era / 36_524 + day_of_era / 146_096;
    let year_of_era = (day_of_era - leap_days) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    (era * 400 + year_of_era + i64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_shown_and_read_alike() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (951_868_800, "2000-03-01T00:00:00Z"),
            (1_767_225_599, "2025-12-31T23:59:59Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(UnixNs(seconds * NS_PER_S).shown(0), text);
            assert_eq!(parse(text), Ok(UnixNs(seconds * NS_PER_S)), "{text}");
        }
        for day in 0..60_000 {
            let (year, month, date) = civil(day);
            assert_eq!(days(year, month, date), day);
        }
        let moment = UnixNs(1_000_000_000_123_456_789);
        assert_eq!(moment.shown(9), "2001-09-09T01:46:40.123456789Z");
        assert_eq!(moment.shown(3), "2001-09-09T01:46:40.123Z");
        assert_eq!(parse("2001-09-09T03:46:40.123456789+02:00"), Ok(moment));
    }

    #[test]
    fn a_moment_is_also_seconds_or_how_long_ago() {
        assert_eq!(parse("17"), Ok(UnixNs(17 * NS_PER_S)));
        assert_eq!(parse("1970-01-02"), Ok(UnixNs(86_400 * NS_PER_S)));
        let (hour_ago, now) = (parse("1h").expect("a time"), UnixNs::now());
        assert!((3600..3700).contains(&((now.0 - hour_ago.0) / NS_PER_S)));
        for wrong in [
            "",
            "x",
            "2025-02-29",
            "2025-1-01",
            "2025-01-01T25:00:00Z",
            "1969-12-31T00:00:00Z",
            "2025-01-01T00:00:00.Z",
        ] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
