//! PURE: the signals that may ask a container to end.

use std::ops::RangeInclusive;

use crate::{pb, text::quote};

/// The names that Kubernetes knows, without `SIG`, and Linux' numbers. It knows the real-time signals too ([`REAL_TIME`]).
const SIGNALS: [(&str, i32); 34] = [
    ("ABRT", 6),
    ("ALRM", 14),
    ("BUS", 7),
    ("CHLD", 17),
    ("CLD", 17),
    ("CONT", 18),
    ("FPE", 8),
    ("HUP", 1),
    ("ILL", 4),
    ("INT", 2),
    ("IO", 29),
    ("IOT", 6),
    ("KILL", 9),
    ("PIPE", 13),
    ("POLL", 29),
    ("PROF", 27),
    ("PWR", 30),
    ("QUIT", 3),
    ("SEGV", 11),
    ("STKFLT", 16),
    ("STOP", 19),
    ("SYS", 31),
    ("TERM", 15),
    ("TRAP", 5),
    ("TSTP", 20),
    ("TTIN", 21),
    ("TTOU", 22),
    ("URG", 23),
    ("USR1", 10),
    ("USR2", 12),
    ("VTALRM", 26),
    ("WINCH", 28),
    ("XCPU", 24),
    ("XFSZ", 25),
];

/// The real-time signals as the kernel and other runtimes number them. The C libraries keep a few for themselves and differ in what
/// they call `SIGRTMIN`, so they are not asked.
pub const REAL_TIME: RangeInclusive<i32> = 34..=64;

/// Kubernetes and other runtimes count up to here from the first real-time signal, and down to here from the last one.
const AFTER_FIRST: i32 = 15;
const BEFORE_LAST: i32 = 14;

impl pb::Container {
    /// The number of the signal that asks the program to end, if the container chose one that is known.
    #[must_use]
    pub fn stop_signal_number(&self) -> Option<i32> {
        self.stop_signal.strip_prefix("SIG").and_then(named)
    }
}

impl pb::ImageConfig {
    /// The number of the signal that asks the image's program to end, if the image names one that is known: by its number
    /// or by its name, with or without `SIG`.
    #[must_use]
    pub fn stop_signal_number(&self) -> Option<i32> {
        let text = self.stop_signal.to_ascii_uppercase();
        let Ok(number) = text.parse::<i32>() else {
            return named(text.strip_prefix("SIG").unwrap_or(&text));
        };
        let known = REAL_TIME.contains(&number) || SIGNALS.iter().any(|(_, its)| *its == number);
        known.then_some(number)
    }
}

/// The number of the signal with this name, without `SIG`.
fn named(name: &str) -> Option<i32> {
    if let Some(rest) = name.strip_prefix("RTMIN") {
        return Some(REAL_TIME.start() + offset(rest, '+', AFTER_FIRST)?);
    }
    if let Some(rest) = name.strip_prefix("RTMAX") {
        return Some(REAL_TIME.end() - offset(rest, '-', BEFORE_LAST)?);
    }
    let mut known = SIGNALS.iter();
    let found = known.find(|(its, _)| *its == name);
    found.map(|(_, number)| *number)
}

/// The number after `sign`; 0 if there is neither.
fn offset(text: &str, sign: char, most: i32) -> Option<i32> {
    if text.is_empty() {
        return Some(0);
    }
    let digits = text.strip_prefix(sign)?;
    let number = digits
        .parse::<i32>()
        .ok()
        .filter(|number| (1..=most).contains(number));
    // `03` and `+3` are numbers, too.
    number.filter(|_| digits.starts_with(|first: char| ('1'..='9').contains(&first)))
}

/// Records what is wrong with the stop signal of a container.
pub(super) fn check(container: &pb::Container, problems: &mut Vec<String>) {
    if !container.stop_signal.is_empty() && container.stop_signal_number().is_none() {
        problems.push(format!(
            "container {:?}: stopSignal {} is not known; name a signal such as SIGUSR1",
            container.name,
            quote(&container.stop_signal, super::SHOWN)
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_names_its_signal_in_several_ways() {
        let of = |text: &str| {
            let config = pb::ImageConfig {
                stop_signal: text.to_owned(),
                ..pb::ImageConfig::default()
            };
            config.stop_signal_number()
        };
        for text in ["SIGQUIT", "QUIT", "quit", "3"] {
            assert_eq!(of(text), Some(3), "{text}");
        }
        // The C library keeps 32 and 33 for itself. Images of systemd have the first two of these.
        for (text, number) in [
            ("SIGRTMIN+3", 37),
            ("37", 37),
            ("rtmin+3", 37),
            ("RTMAX", 64),
            ("31", 31),
            ("34", 34),
            ("64", 64),
        ] {
            assert_eq!(of(text), Some(number), "{text}");
        }
        for text in [
            "",
            "0",
            "-3",
            "32",
            "33",
            "65",
            "SIG",
            "SIGSIGQUIT",
            "RTMIN+16",
            "nonsense",
        ] {
            assert_eq!(of(text), None, "{text}");
        }
    }

    #[test]
    fn a_stop_signal_is_known_by_its_name() {
        let said = |signal: &str| {
            let container = pb::Container {
                name: "a".to_owned(),
                stop_signal: signal.to_owned(),
                ..pb::Container::default()
            };
            let mut problems = Vec::new();
            check(&container, &mut problems);
            (container.stop_signal_number(), problems.join("; "))
        };
        assert_eq!(said(""), (None, String::new()));
        assert_eq!(said("SIGUSR1"), (Some(10), String::new()));
        assert_eq!(said("SIGRTMIN+3"), (Some(37), String::new()));
        let (number, problem) = said("SIGRTMIN+16");
        assert!(
            number.is_none() && problem.contains("\"SIGRTMIN+16\""),
            "{problem}"
        );
        let (number, problem) = said("usr1");
        assert!(
            number.is_none() && problem.contains("\"usr1\""),
            "{problem}"
        );
    }

    /// The names of Kubernetes, with the numbers of other runtimes.
    #[test]
    fn the_real_time_signals_have_the_kernels_numbers() {
        let number = |signal: &str| {
            let container = pb::Container {
                stop_signal: signal.to_owned(),
                ..pb::Container::default()
            };
            container.stop_signal_number()
        };
        assert_eq!(number("SIGRTMIN"), Some(34));
        assert_eq!(number("SIGRTMAX"), Some(64));
        for step in 1..=15 {
            assert_eq!(number(&format!("SIGRTMIN+{step}")), Some(34 + step));
        }
        for step in 1..=14 {
            assert_eq!(number(&format!("SIGRTMAX-{step}")), Some(64 - step));
        }
        for text in [
            "RTMIN",
            "37",
            "SIGRTMIN+0",
            "SIGRTMIN+16",
            "SIGRTMAX-0",
            "SIGRTMAX-15",
            "SIGRTMIN-1",
            "SIGRTMAX+1",
            "SIGRTMIN+",
            "SIGRTMIN3",
            "SIGRTMIN+03",
            "SIGRTMIN++3",
            "SIGRTMIN+ 3",
            "SIGRTMIN+3 ",
            "sigrtmin+3",
            "SIGRTMIN+4294967299",
            "SIGRT",
        ] {
            assert_eq!(number(text), None, "{text}");
        }
    }
}
