//! The allocator and the memory copy functions of the static binaries (ADR 0007).
//!
//! Every `main.rs` names this crate (`use knoc_memory as _;`), and no library does: the crate that builds a binary
//! decides which allocator and which `memcpy` the process has.

mod copy;

/// musl's allocator returns every large buffer to the system at once and requests it again; with it half of the time of
/// a stream is spent in page faults.
#[global_allocator]
static ALLOCATOR: dlmalloc::GlobalDlmalloc = dlmalloc::GlobalDlmalloc;
