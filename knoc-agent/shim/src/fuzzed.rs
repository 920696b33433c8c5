//! Checks that the fuzz targets and the tests share: they feed arbitrary bytes in place of what containers, images and name
//! servers have written, and panic if a property does not hold.
//!
//! Compiled for tests, and with the feature `fuzzed` for the targets in `knoc-agent/fuzz`.

#![allow(
    clippy::expect_used,
    reason = "a harness reports what it found with a panic"
)]

use std::{fs::File, io::Write as _, os::fd::AsRawFd as _, path::PathBuf};

use rustix::fs::{MemfdFlags, memfd_create};

use crate::{egress::dns::message, env_files, launch::account, sif};

/// Looks for the partition of any bytes as an image file, and for its compression.
///
/// # Panics
/// If there is a partition in a file that is no SIF file.
pub fn sif_file(data: &[u8]) {
    let file = memfd_create("image", MemfdFlags::CLOEXEC).expect("a file in memory");
    let mut file = File::from(file);
    file.write_all(data).expect("it is written");
    let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    let is_sif = data.len() >= 128 && data.get(32..42) == Some(b"SIF_MAGIC\0");
    match sif::part(&path) {
        Ok(part) => assert_eq!(part.id.is_some(), is_sif),
        Err(_) => assert!(is_sif),
    }
    if let Some(name) = sif::other_compression(&path) {
        assert!(["lzma", "lzo", "xz", "lz4", "zstd"].contains(&name));
    }
}

/// Looks for a variable, whose name is the first line, in any bytes as a file with variables.
///
/// # Panics
/// If a value is not one of the file, or is not read again if it is written in the format.
pub fn env_file(data: &[u8]) {
    let end = data.iter().position(|byte| *byte == b'\n');
    let (key, text) = data.split_at(end.unwrap_or(data.len()));
    let text = text.get(1..).unwrap_or_default();
    match env_files::find(text, key) {
        Ok(None) => {}
        Ok(Some(value)) => {
            assert!(!value.is_empty() && value.len() <= text.len());
            assert!(!value.iter().any(|byte| b"'\0".contains(byte)));
            let written = [key, b"='", &value, b"'\n"].concat();
            // A line may end with both.
            if !value.windows(2).any(|pair| pair == b"\r\n") {
                let again = env_files::find(&written, key);
                assert_eq!(again.expect("it is in the format"), Some(value));
            }
        }
        Err(error) => {
            let text = knoc_proto::error::chain(&error);
            assert!(!text.chars().any(char::is_control), "{text:?}");
        }
    }
}

/// Reads any bytes as the user that an image names and its `passwd` file.
///
/// # Panics
/// If what is written for the container is not what was wanted.
pub fn passwd_file(data: &[u8]) {
    account::fuzzed::passwd_file(data);
}

/// Reads any bytes as a question of a container and the answer of a name server.
///
/// # Panics
/// If an answer changes otherwise than by its age.
pub fn dns_messages(data: &[u8]) {
    message::fuzzed::dns_messages(data);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    type Harness = fn(&[u8]);

    const HARNESSES: [(&str, Harness); 4] = [
        ("sif_file", sif_file),
        ("env_file", env_file),
        ("passwd_file", passwd_file),
        ("dns_messages", dns_messages),
    ];

    /// The committed inputs of a target.
    fn corpus(target: &str) -> Vec<Vec<u8>> {
        let corpus = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus");
        let inputs = std::fs::read_dir(corpus.join(target)).unwrap();
        inputs
            .map(|entry| std::fs::read(entry.unwrap().path()).unwrap())
            .collect()
    }

    #[test]
    fn the_corpora_pass() {
        for (target, harness) in HARNESSES {
            let inputs = corpus(target);
            assert!(!inputs.is_empty(), "no corpus of {target}");
            for input in &inputs {
                harness(input);
            }
        }
    }

    proptest! {
        #[test]
        fn changed_inputs_keep_the_promises(
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
            cut in any::<prop::sample::Index>(),
        ) {
            for (target, harness) in HARNESSES {
                for mut input in corpus(target) {
                    for (at, byte) in &changes {
                        if !input.is_empty() {
                            let at = at.index(input.len());
                            input[at] = *byte;
                        }
                    }
                    harness(&input);
                    input.truncate(cut.index(input.len() + 1));
                    harness(&input);
                }
            }
        }

        #[test]
        fn any_bytes_keep_the_promises(
            any in prop::collection::vec(any::<u8>(), 0..400),
            lines in "A\n([A-C]='[a\n\r#= ]{0,5}'? ?#?\r?\n){0,5}",
            passwd in "[a-c0-9:]{0,5}\n([a-c]{0,2}:x:(1000|4000000000|[0-9]{1,3}):[0-9]{0,3}:(:/[a-c]?){0,3}\n?){0,5}",
        ) {
            for (_, harness) in HARNESSES {
                harness(&any);
            }
            env_file(lines.as_bytes());
            passwd_file(passwd.as_bytes());
        }
    }
}
