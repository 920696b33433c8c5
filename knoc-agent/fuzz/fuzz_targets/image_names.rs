//! See `knoc_agent::image::fuzzed::image_names`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| knoc_agent::image::fuzzed::image_names(data));
