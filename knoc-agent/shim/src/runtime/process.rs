//! PURE: the runtime without containers, in which the launcher is a plain process of the job. It is for tests, and for
//! sites that forbid container runtimes.
//!
//! There are no namespaces and no mounts, so a pod that mounts volumes fails with an error that names the mount.

use std::{ffi::OsString, path::Path};

use super::{Root, Runtime, RuntimeError, Sandbox};

#[derive(Debug)]
pub(super) struct Process;

impl Runtime for Process {
    fn name(&self) -> &'static str {
        "process"
    }

    fn isolates(&self) -> bool {
        false
    }

    fn writable_roots(&self, _overlay: &Path) -> Vec<Root> {
        vec![Root::ReadOnly]
    }

    fn argv(&self, sandbox: &Sandbox) -> Result<Vec<OsString>, RuntimeError> {
        if let Some(bind) = sandbox.binds.first() {
            return Err(RuntimeError::NoMounts(bind.target.clone()));
        }
        Ok(vec![
            sandbox.agent.clone().into(),
            "launch".into(),
            sandbox.folder.join("launch.sock").into(),
        ])
    }
}
