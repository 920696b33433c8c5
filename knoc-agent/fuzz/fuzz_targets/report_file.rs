//! See `knoc_contract::jobdir::fuzzed::report_file`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| knoc_contract::jobdir::fuzzed::report_file(data));
