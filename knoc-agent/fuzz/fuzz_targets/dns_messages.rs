//! See `knoc_shim::fuzzed::dns_messages`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| knoc_shim::fuzzed::dns_messages(data));
