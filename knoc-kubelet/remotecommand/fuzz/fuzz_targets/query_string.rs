//! Runs `knoc_remotecommand::fuzzed::query_string` with arbitrary bytes.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| knoc_remotecommand::fuzzed::query_string(data));
