//! Streams of bytes over gRPC that are not copied.
//!
//! tonic copies every message when it writes it and again when it reads it. For methods whose messages are pieces of 64
//! KiB, this is a large part of the CPU time of the whole path (ADR 0008). Here the bytes of a message remain the slice
//! in which HTTP/2 delivered them, and a relay that does not look into messages passes bodies on unchanged. The wire
//! format is that of gRPC: tonic, or any other gRPC library, may be at the other end.
//!
//! Routes, metadata, deadlines and generated code remain tonic's. [`RawServer`] around a generated server and
//! [`RawClient`] around a channel pass the bodies of these methods around tonic, as extensions of request and response,
//! which tonic forwards without looking at them. tonic itself sees no messages ([`NoMessages`]).
//!
//! ```text
//!  caller: request(messages) ─RawClient─► HTTP/2 ─RawServer─► input(request)         : handler
//!  caller: output(response)  ◄─RawClient─ HTTP/2 ◄─RawServer─ answer(encode(stream)) : handler
//! ```

mod cancel;
mod messages;
mod raw_body;
mod segments;

pub use self::{
    cancel::CancellableExecutor,
    messages::{Messages, encode, map_status},
    raw_body::{
        NoMessages, RawClient, RawServer, answer, input, output, output_body, request, request_body,
    },
    segments::Segments,
};

/// The methods whose requests and responses are streams of bytes.
const BOTH_WAYS: [&str; 8] = [
    "/knoc.v1.Agent/Exec",
    "/knoc.v1.Agent/Attach",
    "/knoc.v1.Agent/PortForward",
    "/knoc.v1.Agent/EgressStream",
    "/knoc.v1.Shim/Exec",
    "/knoc.v1.Shim/Attach",
    "/knoc.v1.Shim/PortForward",
    "/knoc.v1.Shim/EgressStream",
];

/// The methods of which only the responses are streams of bytes.
const ONE_WAY: [&str; 2] = ["/knoc.v1.Agent/ReadLogs", "/knoc.v1.Shim/ReadLogs"];

fn has_raw_request(path: &str) -> bool {
    BOTH_WAYS.contains(&path)
}

fn has_raw_response(path: &str) -> bool {
    BOTH_WAYS.contains(&path) || ONE_WAY.contains(&path)
}

#[cfg(test)]
mod tests;
