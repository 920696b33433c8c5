//! A step that enters a running job, with `srun --overlap`.

use std::{ffi::OsStr, path::Path};

use knoc_proto::ids::JobId;

use super::Slurm;
use crate::command::Command;

impl Slurm {
    /// `srun` that runs `program` on the first node of `job`, beside whatever the job runs. Its
    /// options claim no resource, so the step neither waits for the job's own steps nor takes
    /// anything from them.
    pub(in crate::scheduler) fn enter(
        &self,
        job: &JobId,
        program: &Path,
        args: [&OsStr; 2],
    ) -> Command {
        let options = [
            "--overlap",
            "--nodes=1",
            "--ntasks=1",
            "--relative=0",
            "--mpi=none",
            "--cpu-bind=none",
            "--job-name=knoc-link",
            // Without it, slurmstepd passes on whole lines only.
            "--unbuffered",
            "--quiet",
            "--chdir=/",
        ];
        let command = self.command(&self.settings().srun).capture(4096);
        // Messages are compared in English.
        let command = command.env("LC_ALL", "C").args(options);
        let command = command.arg(format!("--jobid={job}")).arg(program);
        command.args(args)
    }

    /// Whether the standard error of such a step means that this site permits none. Any other
    /// failure may pass: a node or the controller that does not answer, or a job that is just
    /// ending. Only srun's own lines count: what the program or a task prolog cannot do in one job
    /// says nothing about other jobs.
    pub(in crate::scheduler) fn is_refusal(&self, text: &str) -> bool {
        let srun = self.settings().srun.file_name();
        let own = |line: &str| {
            let (program, message) = line.split_once(": ")?;
            (Path::new(program).file_name() == srun).then(|| message.to_lowercase())
        };
        text.lines()
            .filter_map(own)
            .any(|message| refuses(&message))
    }
}

/// PURE: whether this message of srun, in lower case, is a refusal.
fn refuses(message: &str) -> bool {
    [
        "access/permission denied",
        "permission denied",
        "not permitted",
        "not allowed",
        "prohibited",
        "forbidden",
        "disabled",
        "unrecognized option",
        "invalid option",
    ]
    .iter()
    .any(|refusal| message.contains(refusal))
        // Slurm's words while a step waits for resources.
        && !message.contains("temporarily disabled")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduler::slurm::Settings;

    fn slurm() -> Slurm {
        Slurm::new(Settings {
            srun: "/opt/slurm/bin/srun".into(),
            ..Settings::default()
        })
    }

    #[test]
    fn srun_enters_the_job_beside_whatever_runs_in_it() {
        let slurm = slurm();
        let job = JobId::try_from("4711").unwrap();
        let args = ["connect".as_ref(), "/state/pods/u".as_ref()];
        let command = slurm.enter(&job, Path::new("/v/knoc-agent"), args);
        assert_eq!(command.program(), Path::new("/opt/slurm/bin/srun"));
        let words = format!("{command:?}");
        let at = |word: &str| {
            words
                .find(word)
                .unwrap_or_else(|| panic!("{word}: {words}"))
        };
        assert!(at("--overlap") < at("--jobid=4711") && at("--jobid=4711") < at("/v/knoc-agent"));
        assert!(at("/v/knoc-agent") < at("connect") && at("\"connect\"") < at("/state/pods/u"));
    }

    #[test]
    fn only_words_of_a_refusal_are_one() {
        for refusal in [
            "srun: error: Unable to create step for job 7: Access/permission denied",
            "srun: error: interactive steps are disabled at this site",
            "/opt/slurm/bin/srun: unrecognized option '--overlap'",
            "Welcome\nsrun: error: prohibited\nsrun: error: see the manual (exit status: 1)",
        ] {
            assert!(slurm().is_refusal(refusal), "{refusal}");
        }
        for passing in [
            "srun: error: Task launch for StepId=7.1 failed on node c1: Communication connection failure",
            "srun: error: Unable to contact slurm controller (connect failure)",
            "srun: error: Unable to confirm allocation for job 7: Invalid job id specified",
            "srun: Job 7 step creation temporarily disabled, retrying (Requested nodes are busy)",
            "",
            // One pod whose folder cannot be entered says nothing about the others.
            "Error: relay to the shim on c1, from c1: connect to unix:/tmp/k/shim.sock: Permission denied (os error 13)\n\
             srun: error: c1: task 0: Exited with exit code 1",
            "prolog: X11 forwarding is disabled\nsrun: error: Unable to confirm allocation for job 7",
            "slurmstepd: error: execve(): /v/knoc-agent: Permission denied",
        ] {
            assert!(!slurm().is_refusal(passing), "{passing}");
        }
    }
}
