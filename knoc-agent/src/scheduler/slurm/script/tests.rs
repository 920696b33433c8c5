use std::{path::PathBuf, sync::Arc};

use knoc_proto::pod::PodSpec;
use proptest::prelude::*;

use super::*;
use crate::policy::Live;

fn request(spec: pb::PodSpec) -> SubmitRequest {
    let uid = PodUid::try_from("0e9f5ac4-87ad-4ee6-9b5c-3a9be2f9fd73").unwrap();
    SubmitRequest {
        uid: uid.clone(),
        spec: Arc::new(PodSpec::accepted_before(uid, spec)),
        cluster_id: "7d3f".to_owned(),
        attempt: 2,
        jobdir: PathBuf::from("/home/u/.local/state/knoc/pods/0e9f5ac4"),
        shim: PathBuf::from("/home/u/.local/state/knoc/versions/0.1.0/knoc-agent"),
    }
}

fn shown(rendered: &Rendered) -> String {
    format!("{}\n--\n{}", rendered.argv.join("\n"), rendered.script)
}

#[test]
fn a_plain_pod() {
    let spec = pb::PodSpec {
        namespace: "ns".to_owned(),
        name: "pod".to_owned(),
        ..Default::default()
    };
    let site = Settings {
        prelude: "module load apptainer\n\n".to_owned(),
        ..Settings::default()
    };
    let rendered = render(&request(spec), &site, &[]).unwrap();
    insta::assert_snapshot!(shown(&rendered));
}

#[test]
fn everything_that_can_be_asked_for() {
    let job = pb::JobRequest {
        partition: "gpu".to_owned(),
        account: "proj".to_owned(),
        qos: "high".to_owned(),
        constraint: "a100|h100".to_owned(),
        reservation: "course".to_owned(),
        time_minutes: 90,
        nodes: 2,
        ntasks: 4,
        gres: "tmpfs:1".to_owned(),
        exclusive: true,
        licenses: "matlab:1".to_owned(),
        dependency: "afterok:1".to_owned(),
        flags: vec!["--mail-type=END".to_owned()],
        cpu_millis: 7001,
        memory_bytes: 1 << 30,
        ephemeral_storage_bytes: 1,
        nice: 100,
        mpi: None,
    };
    let gpus = std::collections::HashMap::from([("nvidia.com/gpu".to_owned(), 2)]);
    let limits = pb::Resources {
        extended: gpus.into_iter().collect(),
        ..Default::default()
    };
    let spec = pb::PodSpec {
        namespace: "ns".to_owned(),
        name: "a b|c".to_owned(),
        containers: vec![pb::Container {
            limits: Some(limits),
            ..Default::default()
        }],
        job: Some(job),
        annotations: std::iter::once(("knoc.io/requeue".to_owned(), "true".to_owned())).collect(),
        termination_grace_period_seconds: 30,
        ..Default::default()
    };
    let site = Settings {
        policy: Live::fixed(Policy {
            flags: vec!["--mail-type".to_owned()],
            ..Policy::default()
        }),
        ..Settings::default()
    };
    let rendered = render(&request(spec), &site, &[]).unwrap();
    insta::assert_snapshot!(shown(&rendered));
}

#[test]
fn the_script_contains_nothing_from_the_pod() {
    let nasty = "$(touch /tmp/x)';\n`id`".to_owned();
    let plain = pb::PodSpec {
        name: "p".to_owned(),
        ..Default::default()
    };
    let spec = pb::PodSpec {
        name: nasty.clone(),
        namespace: nasty,
        ..plain.clone()
    };
    let site = Settings::default();
    let one = render(&request(plain), &site, &[]).unwrap();
    let other = render(&request(spec), &site, &[]).unwrap();
    assert_eq!(one.script, other.script);
    assert!(
        other.argv.iter().all(|arg| !arg.contains('\n')),
        "{:?}",
        other.argv
    );
}

#[test]
fn a_comment_says_whose_job_it_is() {
    let spec = pb::PodSpec {
        namespace: "ns".to_owned(),
        name: "pod".to_owned(),
        ..Default::default()
    };
    let request = request(spec);
    let text = comment(&request);
    assert_eq!(
        parse_comment(&text, &request.uid),
        Some(("7d3f".to_owned(), 2))
    );
    let other = PodUid::try_from("other").unwrap();
    assert_eq!(parse_comment(&text, &other), None);
    assert_eq!(parse_comment("hello", &request.uid), None);
    let local = SubmitRequest {
        cluster_id: String::new(),
        ..request
    };
    let parsed = parse_comment(&comment(&local), &local.uid);
    assert_eq!(parsed, Some((String::new(), 2)));
}

#[test]
fn paths_that_no_shell_line_can_carry_are_rejected() {
    for path in ["relative", "/new\nline"] {
        assert!(
            script("", Path::new(path), Path::new("/x")).is_err(),
            "{path}"
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// A quoted word is read by /bin/sh as the original text.
    #[test]
    fn quoting_is_exact(text in "[^\0]{0,40}") {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let line = format!("printf %s {}", quote(&text));
        let run = crate::command::Command::new("/bin/sh").arg("-c").arg(line).run();
        let out = runtime.block_on(run).unwrap();
        prop_assert_eq!(out.stdout, text.into_bytes());
    }

    #[test]
    fn no_pod_breaks_its_comment(
        cluster_id in ".*", namespace in ".*", name in ".*", attempt in any::<u32>(),
    ) {
        let spec = pb::PodSpec { namespace, name, ..Default::default() };
        let request = SubmitRequest { cluster_id: cluster_id.clone(), attempt, ..request(spec) };
        let text = comment(&request);
        prop_assert!(text.len() <= 1024);
        let (_, parsed) = parse_comment(&text, &request.uid).unwrap();
        prop_assert_eq!(parsed, attempt);
    }
}

#[test]
fn a_site_that_lists_choices_allows_no_others() {
    let site = Settings {
        policy: Live::fixed(Policy {
            partitions: vec!["short".to_owned(), "long".to_owned()],
            accounts: vec!["proj".to_owned()],
            qos: vec!["normal".to_owned()],
            ..Policy::default()
        }),
        ..Settings::default()
    };
    let rendered = |partition: &str, account: &str, qos: &str| {
        let job = pb::JobRequest {
            partition: partition.to_owned(),
            account: account.to_owned(),
            qos: qos.to_owned(),
            ..Default::default()
        };
        let spec = pb::PodSpec {
            job: Some(job),
            ..Default::default()
        };
        render(&request(spec), &site, &[]).map_err(|error| error.message)
    };
    assert!(rendered("", "", "").is_ok());
    assert!(rendered("short,long", "proj", "normal").is_ok());
    let message = rendered("short,debug", "other", "high").unwrap_err();
    let expected = "partition \"debug\" is not among policy.partitions of this site (short, long); \
                    account \"other\" is not among policy.accounts of this site (proj); \
                    qos \"high\" is not among policy.qos of this site (normal)";
    assert_eq!(message, expected);
}

#[test]
fn the_allocation_has_room_for_the_ranks() {
    let spec = |mpi| pb::PodSpec {
        job: Some(pb::JobRequest {
            nodes: 2,
            ntasks: 6,
            cpu_millis: 6000,
            mpi,
            ..Default::default()
        }),
        ..Default::default()
    };
    let argv = |mpi| {
        let rendered = render(&request(spec(mpi)), &Settings::default(), &[]).unwrap();
        rendered.argv
    };
    let has = |argv: &[String], word: &str| argv.iter().any(|other| other == word);
    let plain = argv(Some(pb::Mpi::default()));
    assert!(
        has(&plain, "--nodes=2") && has(&plain, "--ntasks=6"),
        "{plain:?}"
    );
    assert!(has(&plain, "--cpus-per-task=1"), "{plain:?}");
    let placed = argv(Some(pb::Mpi {
        ranks_per_node: 3,
        overcommit: true,
        ..Default::default()
    }));
    assert!(has(&placed, "--ntasks-per-node=3"), "{placed:?}");
    assert!(has(&placed, "--overcommit"), "{placed:?}");
    let none = argv(None);
    assert!(
        !none
            .iter()
            .any(|word| word.starts_with("--ntasks-per-node"))
    );
}
