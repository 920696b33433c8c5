//! `knocctl`: the gRPC CLI for diagnostics. All of it is in the library, module `knocctl`.
use std::process::ExitCode;

/// The C library of the static binaries gives every large buffer back to the system at once, and asks for it again: with
/// it half of a stream's time goes into page faults (ADR 0007).
#[global_allocator]
static ALLOCATOR: dlmalloc::GlobalDlmalloc = dlmalloc::GlobalDlmalloc;

fn main() -> ExitCode {
    knoc_kubelet::knocctl::main()
}
