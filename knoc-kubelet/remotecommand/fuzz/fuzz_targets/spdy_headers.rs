//! Runs `knoc_remotecommand::fuzzed::spdy_headers` with arbitrary bytes.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| knoc_remotecommand::fuzzed::spdy_headers(data));
