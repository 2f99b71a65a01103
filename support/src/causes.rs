//! Errors in one line.

use std::error::Error;

/// An error and what caused it, in one line. A cause whose words are there already, for some errors say theirs, is not repeated.
pub fn with_causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let line = error.to_string();
        if !text.contains(&line) {
            text = format!("{text}: {line}");
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use std::fmt;

    use super::*;

    #[derive(Debug)]
    struct Failed(&'static str, Option<Box<Self>>);

    impl fmt::Display for Failed {
        fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
            formatter.write_str(self.0)
        }
    }

    impl Error for Failed {
        fn source(&self) -> Option<&(dyn Error + 'static)> {
            self.1.as_deref().map(|cause| cause as _)
        }
    }

    fn because(what: &'static str, cause: Failed) -> Failed {
        Failed(what, Some(Box::new(cause)))
    }

    #[test]
    fn each_cause_is_said_once() {
        let full = || Failed("disk full", None);
        let said = [
            with_causes(&because("cannot save", because("cannot write", full()))),
            with_causes(&because("cannot save: disk full", full())),
            with_causes(&because("cannot save (disk full), try elsewhere", full())),
        ];
        let wanted = [
            "cannot save: cannot write: disk full",
            "cannot save: disk full",
            "cannot save (disk full), try elsewhere",
        ];
        assert_eq!(said, wanted);
    }
}
