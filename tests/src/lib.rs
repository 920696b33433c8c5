//! What the suites share: processes with deadlines, waiting for states, pods, and the two environments of the tests.
//!
//! [`site::Site`] is level 2: real binaries and real TLS, the embedded scheduler, no root. [`world::World`] is
//! level 3: the stack that `make up` brought up, real Kubernetes, Slurm and Apptainer.

pub mod argo;
pub mod background;
pub mod bench;
pub mod cases;
pub mod charts;
pub mod cluster;
pub mod command;
pub mod conformance;
pub mod doctor;
pub mod endpoint;
pub mod fake_api;
pub mod flood;
pub mod guide;
pub mod image;
pub mod interop;
pub mod nginx;
pub mod one_pod;
pub mod own_addresses;
pub mod pod;
pub mod ports;
pub mod proxy;
pub mod relay;
pub mod repository;
pub mod second_agent;
pub mod several_pods;
pub mod site;
pub mod sshd;
pub mod terminal;
pub mod wait;
pub mod web;
pub mod world;

pub use background::{Background, Forward};
pub use command::{Output, Run};
pub use pod::PodBuilder;
pub use terminal::Terminal;
pub use wait::{stays, wait_for};
pub use world::World;
