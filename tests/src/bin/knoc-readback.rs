//! The container's program in the argv and environment proofs: prints in base64 what the kernel
//! passed to it, `/proc/self/cmdline` and `/proc/self/environ`. Its arguments are the test data, so it
//! has no options. It uses only the standard library: the suites on the real stack compile this file
//! for musl and put it into an image.

use std::io::Write;

/// Characters of a printed line: shorter than a pipe's buffer, so that lines also arrive whole.
const LINE: usize = 4000;

const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

fn main() -> std::io::Result<()> {
    let mut out = String::new();
    for name in ["cmdline", "environ"] {
        let bytes = std::fs::read(format!("/proc/self/{name}"))?;
        let text = base64(&bytes);
        for line in text.as_bytes().chunks(LINE) {
            out.push_str(name);
            out.push(' ');
            out.push_str(&String::from_utf8_lossy(line));
            out.push('\n');
        }
        out.push_str(name);
        out.push_str(" .\n");
    }
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(out.as_bytes())?;
    stdout.flush()
}

fn base64(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let word = (0..3).fold(0_u32, |word, at| {
            (word << 8) | u32::from(group.get(at).copied().unwrap_or_default())
        });
        for digit in 0..4_usize {
            if digit > group.len() {
                text.push('=');
            } else {
                let index = (word >> (18 - 6 * digit)) & 63;
                text.push(char::from(ALPHABET[index as usize]));
            }
        }
    }
    text
}
