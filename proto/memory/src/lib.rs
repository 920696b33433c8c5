//! The allocator and the memory copy of the static binaries (ADR 0007).
//!
//! Every `main.rs` names this crate (`use knoc_memory as _;`), and no library does: which allocator a process has, and
//! which `memcpy`, is decided where the binary is built.

mod copy;

/// The C library of the static binaries gives every large buffer back to the system at once, and asks for it again: with
/// it half of a stream's time goes into page faults.
#[global_allocator]
static ALLOCATOR: dlmalloc::GlobalDlmalloc = dlmalloc::GlobalDlmalloc;
