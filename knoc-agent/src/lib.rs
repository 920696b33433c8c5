//! The agent of KNoC on the login node of an HPC cluster, and the shim inside each Slurm job.
//!
//! One binary, `knoc-agent`, in several processes:
//!
//! - `serve` (module [`app`]): an ordinary user's process on the login node. Owns the life of each pod from accepted
//!   to finished; one actor a pod ([`pod`]).
//! - `shim JOBDIR`: inside the job. Owns the containers of one pod; never needs the agent to be alive.
//! - `init`: makes certificates and the site file. `connect`: relays stdio to the agent's unix socket.
//!
//! What both share is the job directory ([`jobdir`]): files with one owner each.

pub mod api;
pub mod app;
pub mod command;
pub mod config;
pub mod connect;
pub mod doctor;
pub mod image;
pub mod init;
pub mod jobdir;
pub mod launch;
pub mod lease;
pub mod logs;
mod open_files;
mod own_limits;
pub mod pod;
pub mod policy;
pub mod registry;
pub mod renewal;
pub mod runtime;
pub mod scheduler;
pub mod shim;
pub mod shim_links;
pub mod site;
pub mod stats;
mod tree;
pub mod versions;
mod walk;
