//! `knoc-oldkernel COMMAND ARGUMENT…` runs a command as if on Linux 3.10: every newer system call
//! returns ENOSYS, in the command and in all processes that it starts.

use std::collections::BTreeMap;
use std::os::unix::process::CommandExt as _;

use anyhow::Context as _;
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};

/// The first x86-64 system call that 3.10 lacks: `sched_setattr` (3.14). `finit_module`, 313, came
/// with 3.8.
const FIRST_NEW: i64 = 314;

/// One past the numbers in use or foreseen; the x32 table begins here.
const END: i64 = 512;

const ENOSYS: u32 = 38;

fn main() -> anyhow::Result<()> {
    let mut command = std::env::args_os().skip(1);
    let program = command
        .next()
        .context("usage: knoc-oldkernel COMMAND ARGUMENT…")?;
    let filter: BpfProgram = SeccompFilter::new(
        (FIRST_NEW..END)
            .map(|number| (number, Vec::new()))
            .collect::<BTreeMap<_, _>>(),
        SeccompAction::Allow,
        SeccompAction::Errno(ENOSYS),
        TargetArch::x86_64,
    )
    .and_then(TryInto::try_into)
    .context("building the filter")?;
    seccompiler::apply_filter(&filter).context("installing the filter")?;
    #[expect(
        clippy::disallowed_methods,
        reason = "this program becomes the command"
    )]
    let error = std::process::Command::new(&program).args(command).exec();
    Err(error).with_context(|| format!("running {}", program.display()))
}
