//! The lifecycle of a pod on the cluster's side. This file only declares the modules.
//!
//! ```text
//!  watch ──► Store ──► queue ──► controller ── decide (pure) ──┬─ Reject    phase Failed with all reasons, no job
//!  (desired)  ▲                  (one worker per pod)          ├─ Ensure    resolve ► translate ► EnsurePod
//!             │                                                ├─ MarkLost  phase Failed: it ran, and is gone
//!  agent::watch (observed)                                     ├─ Refresh   resolve ► UpdateValues
//!                                                              ├─ Stop      DeletePod(grace)
//!                                                              ├─ Settle    publish the terminal phase first
//!                                                              ├─ Release   DELETE pod, grace 0, UID precondition
//!                                                              ├─ Forget    ForgetPod
//!                                                              ├─ Drop      nothing is left: forget the pod here
//!                                                              └─ Wait
//!                     every round: status (pure) ► urgency (pure) ► publish (PATCH iff changed and due)
//! ```

mod controller;
pub mod decide;
pub mod events;
mod orphans;
mod presence;
pub mod publish;
pub mod queue;
mod references;
mod resize;
mod resolve;
mod services;
pub mod status;
pub(crate) mod store;
mod urgency;
pub mod watch;

pub(crate) use controller::UNREACHABLE_AFTER;
pub use controller::{ApiServer, Context, Controller, KnownPods, LoopHealth, Process, Site};
pub(crate) use orphans::run as watch_orphans;
pub use presence::PodLookup;
pub use references::References;
pub use services::Services;
pub use store::{PodView, Store};
