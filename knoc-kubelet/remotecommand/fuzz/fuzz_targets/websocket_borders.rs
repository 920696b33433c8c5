//! Runs `knoc_remotecommand::fuzzed::websocket_borders` with arbitrary bytes.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| knoc_remotecommand::fuzzed::websocket_borders(data));
