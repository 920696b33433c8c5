//! A pod's life on the cluster side. No code here but declarations.
//!
//! ```text
//!  watch ──► Store ──► queue ──► controller ── decide (pure) ──┬─ Reject    verdict: all reasons, phase Failed, no job
//!  (desired)  ▲                  (one worker a pod)            ├─ Ensure    resolve ► translate ► EnsurePod
//!             │                                                ├─ Refresh   resolve ► UpdateValues
//!  agent::watch (observed)                                     ├─ Stop      DeletePod(grace)
//!                                                              ├─ Release   DELETE pod, grace 0, UID precondition
//!                                                              ├─ Forget    ForgetPod
//!                                                              └─ Rest
//!                     every round: status (pure) ► publish (PATCH iff changed)
//! ```

pub mod quantity;
pub mod status;
mod store;
pub mod translate;
pub mod verdict;

pub use store::{PodView, Store, Uid};
