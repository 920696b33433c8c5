//! The contract between the processes of one pod: the agent on the login node, the shim in the job,
//! and the launcher in each container.
//!
//! The agent and the shim share a job directory ([`jobdir`]), the shim's exit codes
//! ([`exit_codes`]), the capabilities that a shim reports ([`capability`]) and the container logs
//! ([`logs`]). The shim and the launcher speak [`launch`]. The agent and a shim may be of different
//! versions; a shim and its launcher are the same binary.
//!
//! The crate also has the few helpers that both sides need: [`walk`], [`tree`] and [`tree_size`] for
//! folders that others can write, [`host_paths`] for what pods may mount of a node, [`host`] and [`setuid`] for facts about the node. It depends only on
//! `knoc-proto`, so that neither side can reach the other through it.

pub mod capability;
pub mod exit_codes;
pub mod host;
pub mod host_paths;
pub mod image_file;
pub mod jobdir;
pub mod launch;
pub mod logs;
pub mod requeue;
pub mod setuid;
pub mod tree;
pub mod tree_size;
pub mod walk;
