use std::path::PathBuf;

use proptest::prelude::*;

use super::*;
use crate::{config::Policy, policy::Live};

const GIB_62_5: i64 = 64000 * MIB;

fn fixture(version: &str, name: &str) -> String {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    std::fs::read_to_string(root.join(format!("slurm-{version}")).join(name)).unwrap()
}

#[test]
fn capacity_without_double_counting() {
    for version in ["22.05", "24.11", "26.05"] {
        let info = node_info(&fixture(version, "sinfo.txt"), &Settings::default());
        assert_eq!(
            (info.nodes_total, info.nodes_available),
            (3, 3),
            "{version}"
        );
        assert_eq!(
            (info.cpu, info.memory_bytes),
            (96, 3 * GIB_62_5),
            "{version}"
        );
        assert_eq!(info.extended["nvidia.com/gpu"], 2, "{version}");
        let names: Vec<&str> = info.partitions.iter().map(|p| p.name.as_str()).collect();
        assert_eq!(names, ["gpu", "main", "short"], "{version}");
        let [gpu, main, short] = &*info.partitions else {
            unreachable!()
        };
        assert!(
            main.is_default && !gpu.is_default && !short.is_default,
            "{version}"
        );
        assert_eq!(
            (main.max_time_minutes, main.default_time_minutes),
            (10080, 60),
            "{version}"
        );
        assert_eq!(
            (short.max_time_minutes, short.default_time_minutes),
            (2, 1),
            "{version}"
        );
        assert_eq!(
            (gpu.nodes, gpu.cpu, gpu.gres["gpu:fake"]),
            (1, 32, 2),
            "{version}"
        );
        assert_eq!(gpu.features, ["gpu"], "{version}");
    }
}

#[test]
fn nodes_that_are_down_or_drained_do_not_count() {
    for version in ["22.05", "24.11", "26.05"] {
        let info = node_info(&fixture(version, "sinfo-down.txt"), &Settings::default());
        assert_eq!(
            (info.nodes_total, info.nodes_available, info.cpu),
            (3, 1, 32),
            "{version}"
        );
    }
}

#[test]
fn only_what_the_site_offers() {
    let site = Settings {
        policy: Live::fixed(Policy {
            partitions: vec!["gpu".to_owned()],
            ..Policy::default()
        }),
        ..Settings::default()
    };
    let info = node_info(&fixture("24.11", "sinfo.txt"), &site);
    assert_eq!(
        (info.nodes_total, info.cpu, info.partitions.len()),
        (1, 32, 1)
    );
    assert!(!limits(&fixture("24.11", "sinfo.txt"), &site)[0].is_default);
}

#[test]
fn gres_in_all_its_forms() {
    let cases = [
        ("(null)", vec![]),
        ("gpu:2", vec![("gpu", 2)]),
        ("gpu:fake:2", vec![("gpu", 2), ("gpu:fake", 2)]),
        (
            "gpu:a100:4(S:0-1),gpu:t4:1(S:0,1),fpga:1",
            vec![("fpga", 1), ("gpu", 5), ("gpu:a100", 4), ("gpu:t4", 1)],
        ),
        ("bandwidth:lustre:no_consume:4G", vec![]),
        ("tmpfs:16K", vec![("tmpfs", 16384)]),
        ("license", vec![("license", 1)]),
    ];
    for (text, expected) in cases {
        let expected = expected
            .into_iter()
            .map(|(name, n)| (name.to_owned(), n))
            .collect();
        assert_eq!(parse_gres(text), expected, "{text}");
    }
}

#[test]
fn states_where_a_job_may_start_sooner_or_later() {
    for state in [
        "idle", "mix", "mix-", "alloc", "comp", "idle~", "resv", "plnd", "alloc#",
    ] {
        assert!(available(state), "{state}");
    }
    for state in [
        "down", "down*", "drain", "drng", "drain*", "fail", "maint", "idle*", "unk", "inval",
        "mix$",
    ] {
        assert!(!available(state), "{state}");
    }
}

proptest! {
    #[test]
    fn no_text_panics(fields in prop::collection::vec("[ -~]{0,12}", 11), text in "(?s).{0,80}") {
        drop(node_info(&fields.join("|"), &Settings::default()));
        drop(node_info(&text, &Settings::default()));
        drop(parse_gres(&text));
    }
}
