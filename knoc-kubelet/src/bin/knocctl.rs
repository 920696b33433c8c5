//! `knocctl`: the gRPC CLI for diagnostics. All of it is in the library, module `knocctl`.
use std::process::ExitCode;

use knoc_memory as _;

fn main() -> ExitCode {
    knoc_kubelet::knocctl::main()
}
