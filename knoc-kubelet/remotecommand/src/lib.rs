//! Kubernetes' remotecommand protocol as a server speaks it: SPDY/3.1 and WebSocket sessions over any byte stream, the
//! streams in them, and the versions and messages on top. No Kubernetes object and no request of the agent is known here.
//!
//! ```text
//!  socket ── spdy, websocket ──► streams (StreamReader) ──► the relays of the kubelet
//!         ◄── (one session each) ◄── stream_writer (StreamWriter) ◄──
//! ```
//!
//! Owner of a session: the task that polls its `run`. Pure parts: [`protocol`], [`query`], [`ports`], and the codecs
//! `spdy::{frame, headers}` and `websocket::{frame, channel, handshake}`, which the targets in `fuzz/` meet with any bytes.
#![forbid(unsafe_code)]

#[cfg(any(test, feature = "fuzzed"))]
pub mod fuzzed;
pub mod ports;
pub mod protocol;
pub mod query;
pub mod spdy;
pub mod stream_writer;
pub mod streams;
pub mod websocket;
