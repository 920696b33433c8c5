//! Level 2: the real binaries over real TLS with the embedded scheduler; no root, no Slurm, no Kubernetes, no container
//! runtime.
//!
//! The suite is one program, so that all its tests run in parallel.

mod ageing_tokens;
mod argv;
mod backpressure;
mod carried;
mod certificates;
mod cluster;
mod compression;
mod crash;
mod data;
mod dial_out;
mod egress;
mod egress_faults;
mod egress_names;
mod flood;
mod guide;
mod image_updates;
mod ingress;
mod injection;
mod install;
mod knocctl;
mod leadership;
mod lifecycle;
mod link;
mod links;
mod logs;
mod mesh;
mod moments;
mod network;
mod old_kernel;
mod packages;
mod preflight;
mod probes;
mod pull_secrets;
mod relay;
mod restarts;
mod roles;
mod run_modes;
mod secrets;
mod socket;
mod ssh;
mod state;
mod stats;
mod streams;
