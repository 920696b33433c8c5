//! The API over real TLS, with a fake backend and a fake cluster.

mod access;
mod exec;
mod harness;
mod identity;
mod lifecycle;
mod logs;
mod stats;
