//! PURE: the argv of srun, its environment, and which of Slurm's variables a rank sees.
//!
//! The argv has nothing of the pod but numbers. Everything that a site or a user could set by a variable or in slurm.conf
//! and that would break the protocol with the helpers is given explicitly.

use std::{
    ffi::{OsStr, OsString},
    os::unix::ffi::OsStringExt as _,
    path::Path,
};

use knoc_proto::pb::{self, MpiInterface, RankBinding, RankOrder};

/// The variables of srun that a rank sees, beside those of PMI and PMIx. Credentials and the site's configuration are not
/// among them.
const SEEN: &[&str] = &[
    "SLURM_CPUS_ON_NODE",
    "SLURM_CPUS_PER_TASK",
    "SLURM_CPU_BIND",
    "SLURM_DISTRIBUTION",
    "SLURM_GTIDS",
    "SLURM_JOBID",
    "SLURM_JOB_ID",
    "SLURM_JOB_NODELIST",
    "SLURM_JOB_NUM_NODES",
    "SLURM_LAUNCH_NODE_IPADDR",
    "SLURM_LOCALID",
    "SLURM_MPI_TYPE",
    "SLURM_NNODES",
    "SLURM_NODEID",
    "SLURM_NODELIST",
    "SLURM_NPROCS",
    "SLURM_NTASKS",
    "SLURM_PROCID",
    "SLURM_SRUN_COMM_HOST",
    "SLURM_STEPID",
    "SLURM_STEP_ID",
    "SLURM_STEP_NODELIST",
    "SLURM_STEP_NUM_NODES",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_STEP_TASKS_PER_NODE",
    "SLURM_TASKS_PER_NODE",
    "SLURM_TOPOLOGY_ADDR",
];

/// Variables by which srun would start other programs beside the helpers, or treat their input and output in another way.
const NOT_GIVEN: &[&str] = &[
    "SLURM_BCAST",
    "SLURM_CONTAINER",
    "SLURM_CONTAINER_ID",
    "SLURM_EPILOG",
    "SLURM_EXTERNAL_LAUNCHER",
    "SLURM_HOSTFILE",
    "SLURM_PROLOG",
    "SLURM_STDERRMODE",
    "SLURM_STDINMODE",
    "SLURM_STDOUTMODE",
    "SLURM_TASK_EPILOG",
    "SLURM_TASK_PROLOG",
    "SLURM_UNBUFFEREDIO",
];

/// The interfaces by which a rank finds the others.
const INTERFACES: &[&str] = &["PMI_", "PMI2_", "PMIX_"];

/// The variable with the number of the descriptor of PMI. The launcher sets it, because the number changes.
pub(crate) const PMI_FD: &str = "PMI_FD";

/// The variable with the folder in which the PMIx server of the node and its ranks meet.
pub(crate) const PMIX_FOLDER: &str = "PMIX_SERVER_TMPDIR";

/// How a rank gets its data from the PMIx server, unless the pod or its image says it. The server offers files in shared memory, which lie
/// in the `/tmp` of the node, where a container does not see them; a rank that is offered them fails in `MPI_Init`. `hash` sends the data.
const GDS: (&str, &str) = ("PMIX_MCA_gds", "hash");

/// What Open MPI does not use between ranks that do not see each other's processes, unless the pod or its image says it: shared memory
/// (before version 5 the transport is `vader`). It takes a segment for its own if the process that made it has its own PID, and each of
/// these ranks is the first process of a PID namespace: it would write to an address of another process, and crash.
const BTL: (&str, &str) = ("OMPI_MCA_btl", "^sm,vader");

/// The step that runs the ranks.
#[derive(Debug)]
pub(crate) struct Step<'a> {
    pub(crate) srun: &'a Path,
    /// The agent's executable, which is the helper.
    pub(crate) agent: &'a Path,
    pub(crate) jobdir: &'a Path,
    pub(crate) attempt: u32,
    /// Where the shim listens for the helpers.
    pub(crate) addresses: &'a [String],
    pub(crate) job: &'a pb::JobRequest,
    /// `SLURM_CPUS_PER_TASK` of the job, which srun does not take from there.
    pub(crate) cpus_per_task: Option<u32>,
}

impl Step<'_> {
    pub(crate) fn argv(&self) -> Vec<OsString> {
        let mut options = vec![
            format!("--nodes={}", self.job.nodes),
            format!("--ntasks={}", self.job.ntasks),
        ];
        options.extend(
            self.cpus_per_task
                .map(|cpus| format!("--cpus-per-task={cpus}")),
        );
        options.extend(placement(self.job.mpi.unwrap_or_default()));
        let fixed = [
            // The step of an attempt before may not have given back its CPUs yet.
            "--overlap",
            "--label",
            "--input=none",
            // The shim ends the other ranks if one fails: Slurm would kill them, and their exit codes would hide the first one.
            "--kill-on-bad-exit=0",
            "--wait=0",
            "--propagate=NONE",
            "--export=ALL",
            "--chdir=/",
            "--job-name=knoc-ranks",
            "--quiet",
        ];
        options.extend(fixed.map(str::to_owned));
        let mut argv = vec![self.srun.into()];
        argv.extend(options.into_iter().map(OsString::from));
        argv.extend([self.agent.into(), "rank".into(), self.jobdir.into()]);
        argv.push(self.attempt.to_string().into());
        argv.extend(self.addresses.iter().map(OsString::from));
        argv
    }
}

fn placement(mpi: pb::Mpi) -> Vec<String> {
    let interface = match mpi.interface() {
        MpiInterface::Unspecified => None,
        MpiInterface::NoPmi => Some("none"),
        MpiInterface::Pmix => Some("pmix"),
        MpiInterface::Pmi2 => Some("pmi2"),
    };
    let order = match mpi.order() {
        RankOrder::Unspecified => None,
        RankOrder::Block => Some("block"),
        RankOrder::Cyclic => Some("cyclic"),
    };
    let binding = match mpi.binding() {
        RankBinding::Unspecified => None,
        RankBinding::NotBound => Some("none"),
        RankBinding::Threads => Some("threads"),
        RankBinding::Cores => Some("cores"),
        RankBinding::Sockets => Some("sockets"),
        RankBinding::Numa => Some("ldoms"),
    };
    let named = [
        ("mpi", interface),
        ("distribution", order),
        ("cpu-bind", binding),
    ];
    let mut options: Vec<String> = named
        .into_iter()
        .filter_map(|(name, value)| Some(format!("--{name}={}", value?)))
        .collect();
    if mpi.ranks_per_node > 0 {
        options.push(format!("--ntasks-per-node={}", mpi.ranks_per_node));
    }
    if mpi.overcommit {
        options.push("--overcommit".to_owned());
    }
    options
}

/// The variables of the batch step that srun needs to find its job and Slurm.
pub(crate) fn of_slurm(
    all: impl Iterator<Item = (OsString, OsString)>,
) -> impl Iterator<Item = (OsString, OsString)> {
    let given = |name: &OsStr| {
        let known = name.to_str().is_some_and(|name| NOT_GIVEN.contains(&name));
        !known && begins_with_one(name, &["SLURM_", "SLURMD_"])
    };
    all.filter(move |(name, _)| given(name))
}

/// What a rank sees of the variables of its helper, as names and values.
pub(crate) fn of_rank(all: impl Iterator<Item = (OsString, OsString)>) -> Vec<(Vec<u8>, Vec<u8>)> {
    let seen = |name: &OsStr| {
        let known = name.to_str().is_some_and(|name| SEEN.contains(&name));
        known || begins_with_one(name, INTERFACES)
    };
    let seen = all.filter(|(name, _)| seen(name) && name != PMI_FD);
    seen.map(|(name, value)| (name.into_vec(), value.into_vec()))
        .collect()
}

fn begins_with_one(name: &OsStr, prefixes: &[&str]) -> bool {
    let bytes = name.as_encoded_bytes();
    let mut prefixes = prefixes.iter();
    prefixes.any(|prefix| bytes.starts_with(prefix.as_bytes()))
}

/// The environment `env` of a program (`NAME=value`) with the variables of its rank, which replace those of the pod. A rank that finds the
/// others by PMI or PMIx also gets [`GDS`] and, if it is `apart` from others on its node, [`BTL`].
pub(crate) fn with_rank(env: &mut Vec<Vec<u8>>, rank: &[(Vec<u8>, Vec<u8>)], apart: bool) {
    let is = |entry: &[u8], name: &[u8]| {
        entry
            .strip_prefix(name)
            .is_some_and(|rest| rest.starts_with(b"="))
    };
    env.retain(|entry| {
        let mut names = rank.iter().map(|(name, _)| name.as_slice());
        !is(entry, PMI_FD.as_bytes()) && !names.any(|name| is(entry, name))
    });
    let own = rank.iter();
    env.extend(own.map(|(name, value)| [name.as_slice(), value.as_slice()].join(&b'=')));
    let finds = |name: &[u8]| name == b"PMIX_RANK" || name == b"PMI_RANK";
    if !rank.iter().any(|(name, _)| finds(name)) {
        return;
    }
    for (name, value) in [Some(GDS), apart.then_some(BTL)].into_iter().flatten() {
        if !env.iter().any(|entry| is(entry, name.as_bytes())) {
            env.push(format!("{name}={value}").into_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(mpi: pb::Mpi) -> String {
        let job = pb::JobRequest {
            nodes: 2,
            ntasks: 4,
            mpi: Some(mpi),
            ..pb::JobRequest::default()
        };
        let addresses = ["10.0.0.1:4000", "c1:4000"].map(str::to_owned);
        let step = Step {
            srun: Path::new("/opt/slurm/bin/srun"),
            agent: Path::new("/v/knoc-agent"),
            jobdir: Path::new("/state/pods/a b"),
            attempt: 3,
            addresses: &addresses,
            job: &job,
            cpus_per_task: Some(2),
        };
        let argv = step.argv();
        let words = argv.iter().map(|word| word.to_str().unwrap());
        words.collect::<Vec<_>>().join("|")
    }

    #[test]
    fn srun_gets_numbers_and_choices_and_then_the_helper() {
        let plain = step(pb::Mpi::default());
        let end = "|/v/knoc-agent|rank|/state/pods/a b|3|10.0.0.1:4000|c1:4000";
        assert!(plain.starts_with("/opt/slurm/bin/srun|--nodes=2|--ntasks=4|--cpus-per-task=2|"));
        assert!(plain.ends_with(end), "{plain}");
        assert!(
            !plain.contains("--mpi") && !plain.contains("--cpu-bind"),
            "{plain}"
        );
        let mut mpi = pb::Mpi {
            ranks_per_node: 2,
            overcommit: true,
            ..pb::Mpi::default()
        };
        mpi.set_interface(MpiInterface::Pmix);
        mpi.set_order(RankOrder::Cyclic);
        mpi.set_binding(RankBinding::Numa);
        let all = step(mpi);
        let placed =
            "|--mpi=pmix|--distribution=cyclic|--cpu-bind=ldoms|--ntasks-per-node=2|--overcommit|";
        assert!(all.contains(placed), "{all}");
    }

    fn pairs(list: &[(&str, &str)]) -> impl Iterator<Item = (OsString, OsString)> {
        let pairs: Vec<_> = list
            .iter()
            .map(|(name, value)| (OsString::from(name), OsString::from(value)))
            .collect();
        pairs.into_iter()
    }

    #[test]
    fn a_rank_sees_its_place_and_no_credential() {
        let all = [
            ("SLURM_PROCID", "3"),
            ("SLURM_JWT", "secret"),
            ("SLURM_CONF", "/etc/slurm.conf"),
            ("PMIX_RANK", "3"),
            ("PMI_RANK", "3"),
            ("PMI_FD", "17"),
            ("PMI2_X", "y"),
            ("HOME", "/home/u"),
            ("LD_PRELOAD", "/x.so"),
            ("SLURM_TASK_PROLOG", "/bin/program"),
            ("SLURM_CONTAINER_ID", "from `sbatch --container-id`"),
            ("SLURM_STDOUTMODE", "/tmp/file"),
        ];
        let seen = of_rank(pairs(&all));
        let names: Vec<_> = seen
            .iter()
            .map(|(name, _)| String::from_utf8_lossy(name).into_owned())
            .collect();
        assert_eq!(names, ["SLURM_PROCID", "PMIX_RANK", "PMI_RANK", "PMI2_X"]);
        let given: Vec<_> = of_slurm(pairs(&all)).map(|(name, _)| name).collect();
        assert_eq!(given, ["SLURM_PROCID", "SLURM_JWT", "SLURM_CONF"]);
    }

    #[test]
    fn the_rank_of_slurm_replaces_what_the_pod_says() {
        let entry = |text: &str| text.as_bytes().to_vec();
        let mut env = vec![
            entry("SLURM_PROCID=99"),
            entry("SLURM_PROCID_X=1"),
            entry("PMI_FD=1"),
            entry("A=b"),
        ];
        with_rank(&mut env, &[(entry("SLURM_PROCID"), entry("2"))], true);
        let wanted = ["SLURM_PROCID_X=1", "A=b", "SLURM_PROCID=2"].map(entry);
        assert_eq!(env, wanted);
    }

    #[test]
    fn what_would_fail_between_the_containers_of_ranks_is_off_unless_the_pod_says_how() {
        let entry = |text: &str| text.as_bytes().to_vec();
        let given = |env: &[&str], rank: &str, apart| {
            let mut env: Vec<_> = env.iter().map(|text| entry(text)).collect();
            with_rank(&mut env, &[(entry(rank), entry("2"))], apart);
            env
        };
        let with = |env: &[&str], rank: &str| given(env, rank, true);
        let defaults = ["PMIX_MCA_gds=hash", "OMPI_MCA_btl=^sm,vader"].map(entry);
        for rank in ["PMIX_RANK", "PMI_RANK"] {
            let env = with(&[], rank);
            assert_eq!(env[0], entry(&format!("{rank}=2")));
            assert_eq!(env[1..], defaults);
            let env = given(&[], rank, false);
            assert_eq!(env[1..], defaults[..1], "shared memory works");
        }
        let own = with(
            &["PMIX_MCA_gds=shmem2", "OMPI_MCA_btl=self,ofi"],
            "PMIX_RANK",
        );
        let own_ones = [
            "PMIX_MCA_gds=shmem2",
            "OMPI_MCA_btl=self,ofi",
            "PMIX_RANK=2",
        ]
        .map(entry);
        assert_eq!(own, own_ones);
        assert_eq!(with(&[], "SLURM_PROCID"), [entry("SLURM_PROCID=2")]);
    }
}
