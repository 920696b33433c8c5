//! PURE: how many ranks a pod has and how they are started, from `knoc.io/nodes`, `knoc.io/ntasks`, `knoc.io/mpi`, and the
//! options of mpiexec in `slurm-job.knoc.io/mpi-flags` of the Go KNoC.
//!
//! Options are translated into numbers and choices, never into text: whatever a pod writes, no word of it becomes an
//! option of srun. What is not in [`OPTIONS`] is rejected by name. `docs/guide/mpi.md` has the same list.

use std::collections::BTreeMap;

use knoc_proto::{
    pb::{self, MpiInterface, RankBinding, RankOrder},
    pod::MAX_RANKS,
};

const NODES: &str = "knoc.io/nodes";
const NTASKS: &str = "knoc.io/ntasks";
const MPI: &str = "knoc.io/mpi";
const FLAGS: &str = "slurm-job.knoc.io/mpi-flags";

const A_NUMBER: &str = "a number from 1 to 1024";

/// What an option of mpiexec says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Meaning {
    /// How many ranks there are.
    Ranks,
    /// How many ranks are on each node.
    PerNode,
    /// How ranks are numbered over the nodes.
    Order,
    /// To what a rank is bound.
    Binding,
    /// The option has no value: ranks are numbered like this.
    OrderIs(RankOrder),
    /// The option has no value: more ranks than CPUs.
    Overcommit,
    /// The option has no value, and asks for what is so in any case.
    Nothing,
}

/// The options that are translated, of Open MPI, MPICH and srun, by name without dashes.
const OPTIONS: &[(&str, Meaning)] = &[
    ("n", Meaning::Ranks),
    ("np", Meaning::Ranks),
    ("ntasks", Meaning::Ranks),
    ("N", Meaning::PerNode),
    ("npernode", Meaning::PerNode),
    ("perhost", Meaning::PerNode),
    ("ppn", Meaning::PerNode),
    ("ntasks-per-node", Meaning::PerNode),
    ("map-by", Meaning::Order),
    ("distribution", Meaning::Order),
    ("bynode", Meaning::OrderIs(RankOrder::Cyclic)),
    ("byslot", Meaning::OrderIs(RankOrder::Block)),
    ("bind-to", Meaning::Binding),
    ("cpu-bind", Meaning::Binding),
    ("oversubscribe", Meaning::Overcommit),
    ("overcommit", Meaning::Overcommit),
    ("allow-run-as-root", Meaning::Nothing),
];

/// How many nodes and tasks the pod asks for, and how its ranks are started, if it has any.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Asked {
    pub(super) nodes: i32,
    pub(super) ntasks: i32,
    pub(super) mpi: Option<pb::Mpi>,
}

/// Reads the annotations. `wrong` is told the name of an annotation, its value or a part of it, and what is allowed.
pub(super) fn asked(
    annotations: &BTreeMap<String, String>,
    wrong: &mut impl FnMut(&str, &str, &str),
) -> Asked {
    let nodes = count(annotations, NODES, wrong);
    let ntasks = count(annotations, NTASKS, wrong);
    let interface = annotations.get(MPI).map(|value| {
        interface(value.trim()).unwrap_or_else(|| {
            wrong(MPI, value, "`pmix`, `pmi2` or `none`");
            MpiInterface::Unspecified
        })
    });
    // In the Go KNoC, `true` changed nothing.
    let flags = annotations.get(FLAGS).map(|flags| flags.trim());
    let flags = flags.filter(|flags| *flags != "true");
    let mut options = Options::default();
    if let Some(flags) = flags {
        match super::options::split(flags) {
            Some(words) => options.read(&words, wrong),
            None => wrong(FLAGS, flags, "a list of options (a quote is not closed)"),
        }
    }
    if let (Some(asked), Some(flag)) = (ntasks, options.ranks)
        && asked != flag
    {
        wrong(
            FLAGS,
            &format!("-np {flag}"),
            "the number in knoc.io/ntasks; leave one of them out",
        );
    }
    let least = nodes.unwrap_or(1);
    let everywhere = least.saturating_mul(options.mpi.ranks_per_node.max(1));
    let ranked = interface.is_some() || flags.is_some() || least > 1;
    let ntasks = ntasks.or(options.ranks);
    Asked {
        nodes: least,
        ntasks: ntasks.unwrap_or(if ranked { everywhere } else { 1 }),
        mpi: ranked.then(|| pb::Mpi {
            interface: interface.unwrap_or_default().into(),
            ..options.mpi
        }),
    }
}

fn count(
    annotations: &BTreeMap<String, String>,
    name: &str,
    wrong: &mut impl FnMut(&str, &str, &str),
) -> Option<i32> {
    let value = annotations.get(name)?.trim();
    let counted = number(value);
    if counted.is_none() {
        wrong(name, value, A_NUMBER);
    }
    counted
}

/// A number of nodes or ranks.
fn number(text: &str) -> Option<i32> {
    let digits = text.chars().all(|c| c.is_ascii_digit());
    let number: i32 = text.parse().ok().filter(|_| digits)?;
    (1..=MAX_RANKS).contains(&number).then_some(number)
}

fn interface(value: &str) -> Option<MpiInterface> {
    match value {
        "pmix" => Some(MpiInterface::Pmix),
        "pmi2" => Some(MpiInterface::Pmi2),
        "none" => Some(MpiInterface::NoPmi),
        _ => None,
    }
}

/// What the options ask for.
#[derive(Debug, Default)]
struct Options {
    mpi: pb::Mpi,
    ranks: Option<i32>,
}

impl Options {
    fn read(&mut self, words: &[String], wrong: &mut impl FnMut(&str, &str, &str)) {
        let mut words = words.iter();
        while let Some(word) = words.next() {
            let (name, joined) = match word.split_once('=') {
                Some((name, value)) => (name, Some(value)),
                None => (word.as_str(), None),
            };
            let known = name.strip_prefix("--").or_else(|| name.strip_prefix('-'));
            let known = known.and_then(|name| OPTIONS.iter().find(|(known, _)| *known == name));
            let Some((_, meaning)) = known else {
                wrong(
                    FLAGS,
                    word,
                    "an option that KNoC translates for srun: -np, -ppn, --map-by, --bind-to, --oversubscribe and a few more. \
                     Set parameters of MPI as variables of the container, such as OMPI_MCA_btl",
                );
                // Its value, if it has one, would be reported as an option.
                return;
            };
            let has_value = !matches!(
                meaning,
                Meaning::OrderIs(_) | Meaning::Overcommit | Meaning::Nothing
            );
            let value = match (has_value, joined) {
                (true, Some(value)) => value,
                (true, None) => words.next().map_or("", String::as_str),
                (false, None) => "",
                (false, Some(_)) => {
                    wrong(FLAGS, word, "an option without a value");
                    continue;
                }
            };
            if let Err(allowed) = self.take(*meaning, value) {
                wrong(FLAGS, &format!("{name} {value}"), allowed);
            }
        }
    }

    /// Takes one option. The error says what its value may be.
    fn take(&mut self, meaning: Meaning, value: &str) -> Result<(), &'static str> {
        match meaning {
            Meaning::Ranks => self.ranks = Some(number(value).ok_or(A_NUMBER)?),
            Meaning::PerNode => self.mpi.ranks_per_node = number(value).ok_or(A_NUMBER)?,
            Meaning::Order => match value {
                "node" | "cyclic" => self.mpi.set_order(RankOrder::Cyclic),
                "slot" | "core" | "block" => self.mpi.set_order(RankOrder::Block),
                other => {
                    self.mpi.ranks_per_node = per_node(other).ok_or(
                        "one of `node`, `slot`, `core`, `cyclic`, `block` and `ppr:NUMBER:node`",
                    )?;
                }
            },
            Meaning::Binding => {
                let binding = binding(value)
                    .ok_or("one of `none`, `hwthread`, `core`, `socket` and `numa`")?;
                self.mpi.set_binding(binding);
            }
            Meaning::OrderIs(order) => self.mpi.set_order(order),
            Meaning::Overcommit => self.mpi.overcommit = true,
            Meaning::Nothing => {}
        }
        Ok(())
    }
}

/// The number in `ppr:NUMBER:node` of Open MPI.
fn per_node(value: &str) -> Option<i32> {
    number(value.strip_prefix("ppr:")?.strip_suffix(":node")?)
}

fn binding(value: &str) -> Option<RankBinding> {
    match value {
        "none" | "no" => Some(RankBinding::NotBound),
        "hwthread" | "threads" => Some(RankBinding::Threads),
        "core" | "cores" => Some(RankBinding::Cores),
        "socket" | "sockets" => Some(RankBinding::Sockets),
        "numa" | "ldoms" => Some(RankBinding::Numa),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(annotations: &[(&str, &str)]) -> Result<Asked, Vec<String>> {
        let annotations = annotations
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect();
        let mut problems = Vec::new();
        let found = asked(
            &annotations,
            &mut |name: &str, value: &str, allowed: &str| {
                problems.push(format!("{name}: {value}: {allowed}"));
            },
        );
        if problems.is_empty() {
            Ok(found)
        } else {
            Err(problems)
        }
    }

    #[test]
    fn a_pod_has_ranks_if_it_asks_for_nodes_or_mpi() {
        let plain = |ntasks| Asked {
            nodes: 1,
            ntasks,
            mpi: None,
        };
        assert_eq!(of(&[]), Ok(plain(1)));
        assert_eq!(of(&[(NODES, "1"), (NTASKS, "8")]), Ok(plain(8)));
        assert_eq!(of(&[(FLAGS, "true")]), Ok(plain(1)));
        let two = of(&[(NODES, "2")]).unwrap();
        assert_eq!(
            (two.nodes, two.ntasks, two.mpi),
            (2, 2, Some(pb::Mpi::default()))
        );
        for (value, wanted) in [
            ("pmix", MpiInterface::Pmix),
            (" pmi2 ", MpiInterface::Pmi2),
            ("none", MpiInterface::NoPmi),
        ] {
            let asked = of(&[(MPI, value), (NTASKS, "4")]).unwrap();
            assert_eq!((asked.nodes, asked.ntasks), (1, 4));
            assert_eq!(asked.mpi.unwrap().interface(), wanted);
        }
    }

    #[test]
    fn options_of_mpiexec_are_translated() {
        let flags = "-np 8 --map-by node --bind-to core -ppn 4 --oversubscribe --allow-run-as-root";
        let asked = of(&[(NODES, "2"), (FLAGS, flags)]).unwrap();
        let mpi = asked.mpi.unwrap();
        assert_eq!((asked.nodes, asked.ntasks, mpi.ranks_per_node), (2, 8, 4));
        assert_eq!(
            (mpi.order(), mpi.binding(), mpi.overcommit),
            (RankOrder::Cyclic, RankBinding::Cores, true)
        );
        for (flags, per_node, order) in [
            ("--map-by=ppr:3:node", 3, RankOrder::Unspecified),
            ("--byslot", 0, RankOrder::Block),
            (
                "--ntasks-per-node=2 --distribution=cyclic",
                2,
                RankOrder::Cyclic,
            ),
        ] {
            let asked = of(&[(FLAGS, flags)]).unwrap();
            let mpi = asked.mpi.unwrap();
            assert_eq!(
                (mpi.ranks_per_node, mpi.order()),
                (per_node, order),
                "{flags}"
            );
            assert_eq!(asked.ntasks, per_node.max(1), "{flags}");
        }
    }

    #[test]
    fn every_other_option_is_rejected_by_name() {
        for flags in [
            "--hostfile /etc/passwd",
            "--mca btl tcp",
            "--task-prolog=/bin/sh",
            "--multi-prog x",
            "--bind-to core;id",
            "--map-by ppr:0:node",
            "-np",
            "-np 0",
            "-np 1025",
            "-np +4",
            "--oversubscribe=yes",
            "a.out",
            "--",
            "'-np 4",
            "",
        ] {
            let asked = of(&[(FLAGS, flags)]);
            if flags.is_empty() {
                // An empty list asks for ranks as Slurm distributes them.
                assert!(asked.is_ok());
                continue;
            }
            let problems = asked.unwrap_err();
            assert!(problems[0].starts_with(FLAGS), "{flags}: {problems:?}");
        }
        let problems = of(&[(FLAGS, "--hostfile /etc/hosts")]).unwrap_err();
        assert_eq!(problems.len(), 1, "{problems:?}");
        assert!(problems[0].contains("--hostfile"), "{problems:?}");
    }

    #[test]
    fn numbers_that_contradict_each_other_or_are_none_are_named() {
        let problems = of(&[(NTASKS, "4"), (FLAGS, "-np 5")]).unwrap_err();
        assert!(problems[0].contains("-np 5"), "{problems:?}");
        assert!(of(&[(NTASKS, "4"), (FLAGS, "-np 4")]).is_ok());
        for (name, value) in [
            (NODES, "0"),
            (NODES, "two"),
            (NTASKS, "1e3"),
            (MPI, "openmpi"),
        ] {
            let problems = of(&[(name, value)]).unwrap_err();
            assert!(problems[0].starts_with(name), "{problems:?}");
        }
    }

    #[test]
    fn a_pod_of_ranks_is_translated_and_what_it_cannot_have_is_named() {
        let pod = |tty: bool| -> k8s_openapi::api::core::v1::Pod {
            serde_json::from_value(serde_json::json!({
                "metadata": {"name": "p", "uid": "u", "annotations": {
                    NODES: "2", NTASKS: "4", MPI: "pmix", FLAGS: "--map-by node",
                }},
                "spec": {"containers": [{"name": "main", "image": "x", "tty": tty}]},
            }))
            .unwrap()
        };
        let job = crate::shape(&pod(false)).unwrap().job.unwrap();
        assert_eq!((job.nodes, job.ntasks), (2, 4));
        let mpi = job.mpi.unwrap();
        assert_eq!(
            (mpi.interface(), mpi.order()),
            (MpiInterface::Pmix, RankOrder::Cyclic)
        );
        let problems = crate::shape(&pod(true)).unwrap_err();
        assert!(problems[0].contains("tty"), "{problems:?}");
    }
}
