//! See `server::fuzzed::websocket_borders`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| knoc_fuzz::server::fuzzed::websocket_borders(data));
