//! See `knoc_remotecommand::fuzzed::spdy_headers`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| knoc_remotecommand::fuzzed::spdy_headers(data));
