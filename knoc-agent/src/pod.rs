//! The life of one pod on the agent: from accepted to finished. One actor task serves each pod.
//!
//! A pod is separate from its placement, which says where it runs ([`placement`]; today a Slurm job of the pod's own). States
//! without a job and stages of a job are different types:
//!
//! ```text
//!  EnsurePod: the record is on disk
//!     │
//!  ┌──▼─ BeforeJob ────────────────────────────────────────────────────────────┐
//!  │ Accepted ─► Staging ⟲ image back-off                                      │
//!  │               │ job.pb, images, keys are there                            │
//!  │               ▼           refused for now                                 │
//!  │ look by  Submitting ◄───────────────────► Throttled{retry_at}             │
//!  │ name  ◄──┘ │   ▲                                                          │
//!  └────────────│───│─────────────────────────────────────────────────────┬────┘
//!      accepted │   │ the claim is another job's: look by name            │ deleted, or
//!  ┌──────────  ▼   │  WithJob{placement, stage} ─────────────────────┐   │ refused for good
//!  │         Queued ──────────────────────────────┐                   │   │
//!  │           │ round, or a report               │ Delete, or waits  │   │
//!  │           ▼          Delete, or overdue      ▼ forever           │   │
//!  │        Running ───────────────────────► Stopping{deadline}       │   │
//!  │         │ │ ▲                             │ TERM, grace, KILL,   │   │
//!  │         │ │ │ known again                 │ scancel              │   │
//!  │         │ │Lost{since} ── given up ──┐    │                      │   │
//!  │         │ ▼                          │    │                      │   │
//!  │         │ Settling{until} ◄──────────│────┘ the job ended,       │   │
//!  │         │     │                      │      its report is awaited│   │
//!  └─────────│─────│──────────────────────│───────────────────────────┘   │
//!            │ final report, or the end   │                               │
//!            ▼     ▼                      ▼                               ▼
//!         Finished{outcome, lingering} ◄──────────────────────────────────┘
//!            │ ForgetPod
//!            ▼
//!         Forgotten
//! ```
//!
//! Why each edge: a job is submitted only after the intent is on disk, and after any doubt only after a search by name,
//! so no job is lost; if one is submitted twice nevertheless, the claim of the job directory decides which one runs the
//! containers, and the placement follows the claim. A pod that has a job is finished only by the shim's final report,
//! by the end of the job, or, if the scheduler no longer knows the job, after `lost_after` ("given up"). A queued job
//! is stopped if it has waited for `never_ends_after` for a reason that never ends ("waits forever"). Only the end of
//! the job finishes a pod that the agent ends: one that is deleted, or overdue, which means that its deadline was
//! lowered after its shim had read it. `Settling` is published as `Running`, or as `Stopping` if the pod is being
//! deleted. A running pod whose job is back in the queue, perhaps held there, is `Settling` if its shim had begun, since
//! it never runs again, and `Queued` otherwise. A queued or running job that the scheduler does not know becomes `Lost`. `Finished` is final; it keeps the
//! placement as `lingering` until its job has ended.
//!
//! Who may change what: the machine ([`state`]) decides, purely; the actor ([`actor`]) performs and persists; nobody
//! else writes a pod's record. The scheduler owns whether the job lives, the shim owns the containers.

pub mod actor;
pub mod input;
mod non_root;
pub mod outcome;
pub mod placement;
pub mod publish;
pub mod record;
pub mod stage;
pub mod state;
mod update;
