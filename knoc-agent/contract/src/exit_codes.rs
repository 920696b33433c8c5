//! The exit codes of the shim. The batch script replaces itself with the shim (`exec`), so Slurm
//! reports them as the job's exit codes.

use std::process::ExitCode;

/// How a shim ended, as its exit code tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum ShimExit {
    /// The pod succeeded, and its final report is on disk.
    Succeeded = 0,
    /// The pod failed, and its final report is on disk.
    Failed = 64,
    /// The pod has ended, but its final report could not be written.
    NotReported = 65,
    /// Another job holds the claim of the job directory: this job ran nothing.
    Surplus = 66,
    /// The shim could not start: no container ran.
    CannotStart = 67,
}

impl ShimExit {
    const ALL: [Self; 5] = [
        Self::Succeeded,
        Self::Failed,
        Self::NotReported,
        Self::Surplus,
        Self::CannotStart,
    ];

    /// What `code` means; `None` if no shim exits with it.
    #[must_use]
    pub fn of(code: i32) -> Option<Self> {
        Self::ALL.into_iter().find(|exit| exit.code() == code)
    }

    /// The exit code that Slurm reports.
    #[must_use]
    pub fn code(self) -> i32 {
        i32::from(self as u8)
    }

    /// Whether the job directory has a final report.
    #[must_use]
    pub fn promises_report(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed)
    }
}

impl From<ShimExit> for ExitCode {
    fn from(exit: ShimExit) -> Self {
        Self::from(exit as u8)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The codes are part of the protocol: jobs with an older shim keep running while the agent is
    /// upgraded.
    #[test]
    fn the_codes_never_change() {
        let codes = ShimExit::ALL.map(ShimExit::code);
        assert_eq!(codes, [0, 64, 65, 66, 67]);
        for exit in ShimExit::ALL {
            assert_eq!(ShimExit::of(exit.code()), Some(exit));
        }
        for other in [1, 63, 68, 127, 137, -1] {
            assert_eq!(ShimExit::of(other), None, "{other}");
        }
    }
}
