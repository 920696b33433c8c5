//! Level 2: the real binaries over real TLS with the embedded scheduler; no root, no Slurm, no Kubernetes, no container
//! runtime.
//!
//! One program, so that all its tests wait side by side.

mod argv;
mod backpressure;
mod crash;
mod injection;
mod knocctl;
mod lifecycle;
mod link;
mod logs;
mod old_kernel;
mod packages;
mod secrets;
mod state;
mod stats;
mod streams;
