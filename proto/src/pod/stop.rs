//! PURE: the signals that may ask a container to end.

use crate::{pb, text::quote};

/// The names that Kubernetes knows, with Linux' numbers. It knows the real-time signals too, which are not supported.
const SIGNALS: [(&str, i32); 34] = [
    ("SIGABRT", 6),
    ("SIGALRM", 14),
    ("SIGBUS", 7),
    ("SIGCHLD", 17),
    ("SIGCLD", 17),
    ("SIGCONT", 18),
    ("SIGFPE", 8),
    ("SIGHUP", 1),
    ("SIGILL", 4),
    ("SIGINT", 2),
    ("SIGIO", 29),
    ("SIGIOT", 6),
    ("SIGKILL", 9),
    ("SIGPIPE", 13),
    ("SIGPOLL", 29),
    ("SIGPROF", 27),
    ("SIGPWR", 30),
    ("SIGQUIT", 3),
    ("SIGSEGV", 11),
    ("SIGSTKFLT", 16),
    ("SIGSTOP", 19),
    ("SIGSYS", 31),
    ("SIGTERM", 15),
    ("SIGTRAP", 5),
    ("SIGTSTP", 20),
    ("SIGTTIN", 21),
    ("SIGTTOU", 22),
    ("SIGURG", 23),
    ("SIGUSR1", 10),
    ("SIGUSR2", 12),
    ("SIGVTALRM", 26),
    ("SIGWINCH", 28),
    ("SIGXCPU", 24),
    ("SIGXFSZ", 25),
];

impl pb::Container {
    /// The number of the signal that asks the program to end, if the container chose one that is known.
    #[must_use]
    pub fn stop_signal_number(&self) -> Option<i32> {
        let known = SIGNALS.iter();
        let own = known.clone().find(|(name, _)| *name == self.stop_signal);
        own.map(|(_, number)| *number)
    }
}

impl pb::ImageConfig {
    /// The number of the signal that asks the image's program to end, if the image names one that is known: by its number
    /// or by its name, with or without `SIG`.
    #[must_use]
    pub fn stop_signal_number(&self) -> Option<i32> {
        let text = self.stop_signal.to_ascii_uppercase();
        let number = text.parse::<i32>().ok();
        let mut known = SIGNALS.iter();
        let found = known.find(|(name, its)| {
            *name == text || name.strip_prefix("SIG") == Some(&*text) || number == Some(*its)
        });
        found.map(|(_, number)| *number)
    }
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
        for text in ["", "0", "-3", "65", "SIGRTMIN+3", "SIG", "nonsense"] {
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
        let (number, problem) = said("usr1");
        assert!(
            number.is_none() && problem.contains("\"usr1\""),
            "{problem}"
        );
    }
}
