//! See `image::fuzzed::layers`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| knoc_fuzz::image::fuzzed::layers(data));
