//! See `server::fuzzed::query_string`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| knoc_fuzz::server::fuzzed::query_string(data));
