//! The kernel and the operating system of this host, as the Node shows them.

use std::{fs::File, io::Read as _, sync::LazyLock};

/// How much of a file is read.
const MOST: u64 = 64 * 1024;

/// What is known about this host; a part that is not known is empty.
#[derive(Debug, Default)]
pub struct Host {
    /// The release of the kernel, such as `6.1.0-25-amd64`.
    pub kernel: String,
    /// The name and version of the operating system, such as `Debian GNU/Linux 12 (bookworm)`.
    pub os: String,
}

/// What is known about this host. The files are read once, because a process does not outlive its kernel.
#[must_use]
pub fn host() -> &'static Host {
    static HOST: LazyLock<Host> = LazyLock::new(|| {
        let os = ["/etc/os-release", "/usr/lib/os-release"]
            .into_iter()
            .find_map(|path| pretty_name(&read(path)?));
        Host {
            kernel: read("/proc/sys/kernel/osrelease")
                .map(|text| text.trim().to_owned())
                .unwrap_or_default(),
            os: os.unwrap_or_default(),
        }
    });
    &HOST
}

/// The beginning of a text file, or None if it cannot be read.
fn read(path: &str) -> Option<String> {
    let mut text = String::new();
    let file = File::open(path).ok()?;
    file.take(MOST).read_to_string(&mut text).ok()?;
    Some(text)
}

/// PURE: the value of `PRETTY_NAME` in a file of the form of os-release(5).
fn pretty_name(text: &str) -> Option<String> {
    let value = text
        .lines()
        .filter_map(|line| line.trim().strip_prefix("PRETTY_NAME="))
        .next_back()?
        .trim();
    let inner = ['"', '\''].into_iter().find_map(|quote| {
        let rest = value.strip_prefix(quote)?;
        rest.strip_suffix(quote)
    });
    let name = inner.unwrap_or(value);
    (!name.is_empty()).then(|| name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_of_the_operating_system_is_found_with_and_without_quotes() {
        for (text, name) in [
            (
                "NAME=x\nPRETTY_NAME=\"Debian GNU/Linux 12 (bookworm)\"\n",
                Some("Debian GNU/Linux 12 (bookworm)"),
            ),
            ("PRETTY_NAME='Rocky Linux 9.4'", Some("Rocky Linux 9.4")),
            ("PRETTY_NAME=Alpine", Some("Alpine")),
            ("PRETTY_NAME=a\nPRETTY_NAME=b", Some("b")),
            ("PRETTY_NAME=\"\"", None),
            ("NAME=x", None),
        ] {
            assert_eq!(pretty_name(text).as_deref(), name, "{text}");
        }
    }

    #[test]
    fn this_host_has_a_kernel() {
        let version = |c: char| c.is_ascii_digit();
        assert!(host().kernel.starts_with(version), "{:?}", host());
    }
}
