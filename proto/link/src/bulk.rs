//! Streams of bytes over gRPC, without copying them.
//!
//! tonic copies every message when it writes it and again when it reads it. Of the methods whose messages are pieces of
//! 64 KiB that is a large part of all processor time on their way (ADR 0008). Here a message's bytes stay
//! the slice in which HTTP/2 delivered them, and a relay that does not look into messages passes bodies on as they are.
//! On the wire nothing differs: tonic, or any gRPC library, may stand at the other end.
//!
//! Routes, metadata, deadlines and the generated code stay tonic's. [`Served`] around a server and [`Called`] around a
//! channel lay the bodies of these methods *beside* tonic: as extensions of request and response, where it hands them
//! on unseen.
//!
//! ```text
//!  caller: request(messages) ─Called─► HTTP/2 ─Served─► input(request)         : handler
//!  caller: output(response)  ◄─Called─ HTTP/2 ◄─Served─ answer(encode(stream)) : handler
//! ```

mod beside;
mod cut;
mod messages;
mod segments;

pub use self::{
    beside::{Called, Nothing, Served, answer, input, output, output_body, request, request_body},
    cut::Cutting,
    messages::{Messages, encode, failing_by},
    segments::Segments,
};

/// The methods whose requests are streams of bytes.
const BOTH_WAYS: [&str; 6] = [
    "/knoc.v1.Agent/Exec",
    "/knoc.v1.Agent/Attach",
    "/knoc.v1.Agent/PortForward",
    "/knoc.v1.Shim/Exec",
    "/knoc.v1.Shim/Attach",
    "/knoc.v1.Shim/PortForward",
];

/// The methods of which only the answers are.
const ONE_WAY: [&str; 2] = ["/knoc.v1.Agent/ReadLogs", "/knoc.v1.Shim/ReadLogs"];

fn bytes_come(path: &str) -> bool {
    BOTH_WAYS.contains(&path)
}

fn bytes_go(path: &str) -> bool {
    BOTH_WAYS.contains(&path) || ONE_WAY.contains(&path)
}

#[cfg(test)]
mod tests;
