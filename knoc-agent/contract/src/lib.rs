//! What the processes of one pod agree on: the agent on the login node, the shim in the job, the launcher in a container.
//!
//! The agent and the shim meet in a job directory ([`jobdir`]), by the shim's exit code ([`exit_codes`]), and by what the
//! shim says that it can do ([`capability`]); both read its logs ([`logs`]). The shim and the launcher speak [`launch`].
//! They may be of different versions, except the shim and its launcher, which are the same file.
//!
//! Beside these formats the crate holds the few helpers that both sides need: [`walk`] and [`tree`] for folders that
//! others can write, [`host`] and [`setuid`] for facts of the node. It depends on `knoc-proto` alone, so that neither
//! side can reach the other through it.

pub mod capability;
pub mod exit_codes;
pub mod host;
pub mod image_file;
pub mod jobdir;
pub mod launch;
pub mod logs;
pub mod requeue;
pub mod setuid;
pub mod tree;
pub mod walk;
