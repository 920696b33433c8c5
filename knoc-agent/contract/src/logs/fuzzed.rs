//! Shared by the fuzz target and the tests: any bytes as log files and as a program's output, and
//! what must hold for them. A violation panics.
//!
//! Compiled for tests, and with the feature `fuzzed` for the targets in `knoc-agent/fuzz`.

#![allow(
    unreachable_pub,
    clippy::panic,
    reason = "public for the fuzz targets; a harness says what it found by a panic"
)]

use super::{
    cri::{Cutter, MAX_TEXT, STAMP_LEN, Stream, parse},
    filter::{Filter, Options},
};

const STAMP: &str = "2026-11-22T18:01:56.123456789Z";

/// Filters any bytes as a log file, and splits and reads them as the output of a program.
///
/// # Panics
/// If a limit is exceeded, the output is longer than the input, or a byte is lost.
pub fn log_lines(data: &[u8]) {
    let (flags, data) = match data.split_first() {
        Some((first, rest)) => (*first, rest),
        None => (0, data),
    };
    read(flags, data);
    cut(flags, data);
}

fn read(flags: u8, data: &[u8]) {
    let limit = (flags & 1 != 0).then_some(u64::from(flags) + 1);
    let mut filter = Filter::new(Options {
        stream: (flags & 2 != 0).then_some(Stream::Stderr),
        since: (flags & 4 != 0).then(|| STAMP.to_owned()),
        limit_bytes: limit,
        timestamps: flags & 8 != 0,
        ..Options::default()
    });
    let mut out = Vec::new();
    // The result must be the same whether the lines come together or one at a time.
    for block in data.chunk_by(|byte, _| *byte != b'\n' || flags & 16 != 0) {
        filter.keep(block, &mut out);
    }
    if let Some(limit) = limit {
        assert!(out.len() <= usize::try_from(limit).unwrap_or(usize::MAX));
        assert_eq!(filter.done(), out.len() == usize::from(flags) + 1);
    }
    assert!(out.len() <= data.len(), "{} bytes came out", out.len());
}

fn cut(flags: u8, data: &[u8]) {
    let mut cutter = Cutter::new(Stream::Stdout);
    let mut file = Vec::new();
    let mut pieces = 0;
    for piece in data.chunks(usize::from(flags) * 97 + 1) {
        pieces += cutter.push(piece, STAMP, &mut file);
    }
    pieces += cutter.finish(STAMP, &mut file);
    let mut text = Vec::new();
    let lines = file.strip_suffix(b"\n").unwrap_or_default();
    for line in lines
        .split(|byte| *byte == b'\n')
        .filter(|_| !file.is_empty())
    {
        assert!(line.len() <= STAMP_LEN + 10 + MAX_TEXT);
        let Some(piece) = parse(line) else {
            assert!(line.is_empty(), "a line that is none");
            continue;
        };
        pieces -= 1;
        text.extend_from_slice(piece.text);
        if !piece.partial {
            text.push(b'\n');
        }
    }
    assert_eq!(pieces, 0, "as many pieces as were counted");
    assert!(
        text == data,
        "{} of {} bytes came back",
        text.len(),
        data.len()
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_corpus_passes() {
        let folder =
            std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus/log_lines");
        let mut inputs = 0;
        for entry in std::fs::read_dir(folder).unwrap() {
            log_lines(&std::fs::read(entry.unwrap().path()).unwrap());
            inputs += 1;
        }
        assert!(inputs > 0, "no corpus");
    }

    proptest! {
        #[test]
        fn any_bytes_keep_the_promises(flags in any::<u8>(), lines in prop::collection::vec(
            prop_oneof![
                "[0-9TZ:.-]{0,30} (stdout|stderr) [FPX] [ -~]{0,20}",
                "\\PC{0,60}",
            ],
            0..12,
        )) {
            let data = lines.join("\n");
            log_lines(&[&[flags], data.as_bytes()].concat());
        }
    }
}
