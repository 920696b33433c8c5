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
}

/// PURE: whether srun's message means that this site permits no such step. Any other failure may
/// pass: a node or the controller that does not answer, or a job that is just ending.
#[must_use]
pub fn is_refusal(text: &str) -> bool {
    let text = text.to_lowercase();
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
    .any(|refusal| text.contains(refusal))
        // Slurm's words while a step waits for resources.
        && !text.contains("temporarily disabled")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduler::slurm::Settings;

    #[test]
    fn srun_enters_the_job_beside_whatever_runs_in_it() {
        let slurm = Slurm::new(Settings {
            srun: "/opt/slurm/bin/srun".into(),
            ..Settings::default()
        });
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
            "srun: unrecognized option '--overlap'",
        ] {
            assert!(is_refusal(refusal), "{refusal}");
        }
        for passing in [
            "srun: error: Task launch for StepId=7.1 failed on node c1: Communication connection failure",
            "srun: error: Unable to contact slurm controller (connect failure)",
            "srun: error: Unable to confirm allocation for job 7: Invalid job id specified",
            "srun: Job 7 step creation temporarily disabled, retrying (Requested nodes are busy)",
            "",
        ] {
            assert!(!is_refusal(passing), "{passing}");
        }
    }
}
