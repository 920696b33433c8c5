//! The agent of KNoC on the login node of an HPC cluster.
//!
//! The binary `knoc-agent` runs as several kinds of processes:
//!
//! - `serve` (module [`app`]): an ordinary user's process on the login node. It owns the life of each
//!   pod from accepted to finished, with one actor for each pod ([`pod`]).
//! - `init`: creates certificates and the site file. `connect`: relays stdio to the agent's unix
//!   socket, or, in a job, to the shim's.
//! - `shim JOBDIR`, and the hidden `contain`, `launch` and `enter`, in and around a job's containers.
//!   They are in the crate `knoc-shim`, which only `main.rs` calls.
//!
//! The agent and the shim share only the crate `knoc-contract`, which defines the job directory and
//! other formats.

pub mod api;
pub mod app;
pub mod command;
pub mod config;
pub mod connect;
pub mod dial_out;
pub mod doctor;
pub mod egress;
pub mod host;
pub mod image;
pub mod init;
pub mod lease;
pub mod linger;
pub mod manage;
pub mod mesh;
pub mod on_demand;
mod open_files;
mod own_limits;
pub mod pod;
pub mod policy;
pub mod registry;
pub mod renewal;
pub mod run_mode;
pub mod scheduler;
pub mod shim_carry;
pub mod shim_connect;
pub mod shim_links;
pub mod shim_route;
pub mod shim_steps;
pub mod site;
pub mod stats;
pub mod versions;
