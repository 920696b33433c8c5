//! The life of one pod on the agent: from accepted to finished, one actor task a pod.
//!
//! ```text
//!  EnsurePod
//!     │ record on disk
//!  Accepted ─► Staging ⟲ image back-off
//!                │ job.pb, images, keys
//!                ▼      refused for now
//!            Submitting ◄────────────► Throttled{retry_at}
//!     look by    │  │ accepted              (refused for good: Finished)
//!     name  ◄────┘  ▼
//!     first       Queued{job} ──────────────┐
//!                   │ round, or a report    │ Delete, reason that never ends
//!                   ▼         Delete, or    ▼
//!                Running{job} ─overdue─► Stopping{deadline} ── TERM, grace, KILL, scancel
//!                   │   ▲                   │
//!                   │   │ known again       │ job gone
//!                   │  Lost{since}          │
//!                   ▼   │                   ▼
//!                Settling{ended} ────────► Finished{outcome} ─► Forgotten
//!           the job ended, its report is awaited
//! ```
//!
//! Why each edge: a job is submitted only after the intent is on disk, and after any doubt only after looking by
//! name, so none is lost; what is submitted twice all the same is sorted out by the claim of the job directory. Only
//! the shim's final report, or the end of the job, finishes a pod; only the end of the job finishes one that is being
//! ended by us: deleted, or overdue, which is one whose deadline was lowered after its shim had read it. `Settling` is published as `Running` (`Stopping` where the pod is being deleted). `Finished` absorbs.
//!
//! Who may change what: the machine ([`state`]) decides, purely; the actor ([`actor`]) performs and persists; nobody
//! else writes a pod's record. The scheduler owns whether the job lives, the shim owns the containers.

pub mod actor;
pub mod input;
pub mod outcome;
pub mod publish;
pub mod record;
pub mod stage;
pub mod state;
mod update;
