//! See `knoc_agent::image::fuzzed::layers`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| knoc_agent::image::fuzzed::layers(data));
