//! The agent of KNoC on the login node of an HPC cluster.
//!
//! One binary, `knoc-agent`, in several processes:
//!
//! - `serve` (module [`app`]): an ordinary user's process on the login node. Owns the life of each pod from accepted
//!   to finished; one actor a pod ([`pod`]).
//! - `init`: makes certificates and the site file. `connect`: relays stdio to the agent's unix socket.
//! - `shim JOBDIR`, and the hidden `contain`, `launch` and `enter`, in and around a job's containers: they are the crate
//!   `knoc-shim`, which only `main.rs` calls.
//!
//! The agent and the shim share the job directory and what else is in `knoc-contract`; neither sees the other's modules.

pub mod api;
pub mod app;
pub mod command;
pub mod config;
pub mod connect;
pub mod doctor;
pub mod image;
pub mod init;
pub mod lease;
pub mod linger;
pub mod on_demand;
mod open_files;
mod own_limits;
pub mod pod;
pub mod policy;
pub mod registry;
pub mod renewal;
pub mod scheduler;
pub mod shim_links;
pub mod site;
pub mod stats;
pub mod versions;
