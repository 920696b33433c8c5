//! What all processes of KNoC share: the gRPC contracts, the domain types and the reasons of errors.
//!
//! Every other crate of the workspace depends on this one, and it depends on none of them. It starts no process, reads
//! no configuration file, opens no connection and decides nothing about pods. Its modules are pure, except [`log`] and
//! [`log_limit`] (where log lines go, and how many), [`private`] (protects the memory of a process) and [`crash`] (lets
//! tests kill a process at a named point). `knoc-link` connects processes with each other.

pub mod capability;
pub mod crash;
pub mod egress;
pub mod error;
pub mod expand;
pub mod ids;
pub mod log;
pub mod log_limit;
pub mod login;
pub mod manage;
pub mod mesh;
pub mod names;
pub mod overlap;
pub mod paths;
mod patterns;
pub mod pod;
pub mod private;
pub mod reason;
pub mod settings;
pub mod text;

/// The data in one message of a byte stream, in bytes: small enough to interleave with other streams, large enough that
/// framing costs little; with the headers of message and frame it fills exactly four TLS records.
pub const CHUNK: usize = (64 << 10) - 64;

/// The generated messages and services of `knoc/v1/*.proto`, which document them.
#[allow(
    missing_docs,
    missing_debug_implementations,
    unreachable_pub,
    clippy::allow_attributes_without_reason,
    clippy::or_fun_call,
    clippy::all,
    clippy::pedantic,
    reason = "generated code"
)]
pub mod pb {
    tonic::include_proto!("knoc.v1");
    /// The encoded file descriptors, for gRPC reflection.
    pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/knoc.v1.bin"));
}
