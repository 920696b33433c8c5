//! What the processes of KNoC share: the gRPC contracts, domain types, error reasons, the link.
//!
//! Dependencies point one way: `knoc-kubelet → knoc-proto ← knoc-agent`. This crate starts no process, reads no
//! configuration and decides nothing about pods; what it holds is either pure ([`ids`], [`names`], [`paths`], [`pod`],
//! [`expand`], [`reason`], [`error`], [`settings`], [`text`]) or the transport both ends need ([`link`], [`bulk`], [`pki`]),
//! or where their logs go ([`log`]).

pub mod bulk;
pub mod crash;
pub mod error;
pub mod expand;
pub mod ids;
pub mod link;
pub mod log;
pub mod log_limit;
mod memory;
pub mod names;
pub mod paths;
pub mod pki;
pub mod pod;
pub mod private;
pub mod reason;
pub mod settings;
pub mod text;

/// The generated messages and services of `knoc/v1/*.proto`; the texts stand in the `.proto` files.
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
    /// The encoded descriptors, for gRPC reflection.
    pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/knoc.v1.bin"));
}
