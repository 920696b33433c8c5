//! See `knoc_remotecommand::fuzzed::query_string`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| knoc_remotecommand::fuzzed::query_string(data));
