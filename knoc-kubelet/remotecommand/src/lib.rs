//! The server side of Kubernetes' remotecommand protocol: SPDY/3.1 and WebSocket sessions over any byte stream, the
//! streams in them, and the protocol versions and messages above them. This crate knows no Kubernetes objects and no
//! requests of the agent.
//!
//! ```text
//!  socket ── spdy, websocket ──► streams (StreamReader) ──► the relays of the kubelet
//!         ◄── (one session each) ◄── stream_writer (StreamWriter) ◄──
//! ```
//!
//! The task that polls a session's `run` owns the session. Pure parts: [`protocol`], [`query`], [`ports`], and the
//! codecs `spdy::{frame, headers}` and `websocket::{frame, channel, handshake}`, which the targets in `fuzz/` feed with
//! arbitrary bytes.
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
