//! No container: the launcher runs as a plain process of the job. For tests, and for sites that forbid runtimes.
//!
//! There is no namespace and no mount, so a pod with volumes is refused by name. PURE.

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
