//! See `knoc_contract::logs::fuzzed::log_lines`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| knoc_contract::logs::fuzzed::log_lines(data));
