//! The cluster side of KNoC: the library under `knoc-kubelet`.
//!
//! # Tasks of `knoc-kubelet` and the channels between them
//!
//! ```text
//!  kube-apiserver                                                              knoc-agent
//!     │ watch pods          ┌──────────────┐   queue (uid, latest wins)             │ WatchPods, WatchNode
//!     └────► pods::watch ──►│ pods::Store  │──────────────► pods::controller        ▼
//!                           │ uid → desired│◄─────────────────────────────── agent::watch
//!                           │       observed                   │ a worker per pod │ watch<Link>, watch<NodeInfo>
//!                           └──────┬───────┘                   │                  ▼
//!                                  │ read only                 ├─► EnsurePod …   node (status), node::lease
//!                                  ▼                           ├─► PATCH status, DELETE pod
//!                               server                         └─► pods::events (bounded, own task)
//! ```
//!
//! `app` is the composition root: it owns every task and joins it. Policy is in pure modules (`pods::{decide, status}`,
//! `node::status`, `knoc_translate`); the tasks around them only carry it out. `egress` and `relay` carry connections of pods to the
//! cluster and of the cluster to pods. `certs` has one task for each of our own
//! certificates, and `identity` the clients that use them. Nothing is kept on disk: after a restart both first lists
//! have everything that the kubelet needs to know.
#![forbid(unsafe_code)]

pub mod agent;
pub mod api_client;
pub mod app;
pub mod certs;
pub mod config;
pub mod egress;
mod halves;
pub mod identity;
pub mod leader;
pub mod metrics;
pub mod node;
pub mod pods;
pub mod relay;
pub mod server;
pub mod stats;
