//! The API over real TLS, with a fake backend and a fake cluster.

mod access;
mod commands;
mod exec;
mod flood;
pub(super) mod harness;
mod identity;
mod lifecycle;
mod limits;
mod logs;
mod portforward;
mod records;
mod stats;
mod unsupported;
mod websocket;
