//! Runs `knoc_remotecommand::fuzzed::spdy_frames` with arbitrary bytes.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| knoc_remotecommand::fuzzed::spdy_frames(data));
