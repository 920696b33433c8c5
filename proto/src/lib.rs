//! What the processes of KNoC share: the gRPC contracts, domain types, error reasons, the link.
#![forbid(unsafe_code)]

/// The generated messages and services of `knoc/v1/*.proto`; the texts stand in the `.proto` files.
#[allow(
    missing_docs,
    missing_debug_implementations,
    unreachable_pub,
    clippy::all,
    clippy::pedantic,
    reason = "generated code"
)]
pub mod pb {
    tonic::include_proto!("knoc.v1");
    /// The encoded descriptors, for gRPC reflection.
    pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/knoc.v1.bin"));
}
