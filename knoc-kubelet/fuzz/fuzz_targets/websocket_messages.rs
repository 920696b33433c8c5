//! See `server::fuzzed::websocket_messages`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| knoc_fuzz::server::fuzzed::websocket_messages(data));
