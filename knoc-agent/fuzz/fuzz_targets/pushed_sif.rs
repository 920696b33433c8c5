//! See `knoc_agent::image::fuzzed::pushed_sif`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| knoc_agent::image::fuzzed::pushed_sif(data));
