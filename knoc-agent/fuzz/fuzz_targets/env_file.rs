//! See `knoc_shim::fuzzed::env_file`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| knoc_shim::fuzzed::env_file(data));
