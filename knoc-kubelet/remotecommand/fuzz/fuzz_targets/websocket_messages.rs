//! Runs `knoc_remotecommand::fuzzed::websocket_messages` with arbitrary bytes.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| knoc_remotecommand::fuzzed::websocket_messages(data));
