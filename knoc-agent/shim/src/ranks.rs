//! The ranks of an MPI program: what the shim and the helpers that srun starts have in common.
//!
//! The shim runs on the first node of the job. For a pod with `knoc.io/mpi` it does not start the container itself. It
//! starts srun, and srun starts one helper for each rank, on the rank's node and in the cgroup and with the CPUs that Slurm
//! gives to the rank. The helper makes a container of the same image with the same volumes and environment, and becomes
//! its parent.
//!
//! ```text
//! shim (first node)                                       helper of a rank (its node): `knoc-agent rank`
//!   container::parallel ──srun──────────────────────────►   rank
//!     │  ◄─────────── TLS, both sides with the pod's key ───  dials; hello {attempt, rank, node}
//!     │  ──── start {container, image, values} ───────────►   folders, volumes, container
//!     │  ◄─── running {pid} ──────────────────────────────    its program runs
//!     │  ──── signal ─────────────────────────────────────►
//!     │  ◄─── ended {code, reason, message, usage} ────────    its program has ended
//!     └─ ◄─── standard output and error, labelled, by srun     the helper exits with the code
//! ```
//!
//! A command beside the program of a rank (`kubectl exec` for rank 0, `knocctl exec --rank` for any) has a connection of its own, which the helper opens when
//! the shim asks for it. Over that, the messages of `Exec` go as they are.
//!
//! No value of a pod is in the argv or the environment of srun, and none crosses the network but inside of TLS. The key
//! pair lies in the job directory, which only the account can read; a peer that cannot prove that it has it gets no answer.
//!
//! - [`table`]: PURE, the states of the ranks and what follows from them.
//! - [`step`]: PURE, the argv of srun, and which of Slurm's variables a rank sees.
//! - [`wire`]: messages with their length in front.
//! - [`peer`]: the shim's side of one connection.
//! - [`command`]: the shim's side of a command in a rank.
//! - [`node`]: what the ranks on one node share.

pub(crate) mod command;
pub(crate) mod node;
pub(crate) mod peer;
pub(crate) mod step;
pub(crate) mod table;
pub(crate) mod wire;
