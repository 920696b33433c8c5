use knoc_proto::ids::{JobId, PodUid};

use super::*;
use crate::scheduler::slurm::parse;

const PODS: &str = "/pods";
const SUBMITTED: i64 = 1_795_373_120;

fn row(name: &str) -> Row {
    let line =
        format!("7|PENDING|Priority|main||2026-11-22T18:45:20|Unknown|Unknown|1:00:00|{name}|x\n");
    parse::squeue(&line).unwrap().remove(0)
}

fn own(call: Option<(i64, i64)>, submitted_at: Option<i64>) -> JobRef {
    let (id, uid) = (JobId::try_from("7"), PodUid::try_from("u"));
    JobRef {
        call,
        submitted_at,
        ..JobRef::new(id.unwrap(), uid.unwrap())
    }
}

fn detail() -> Detail {
    let text = "JobId=7 JobState=PENDING Restarts=0 ExitCode=0:0 SubmitTime=2026-11-22T18:45:20 Command=(null) WorkDir=/home Comment=x";
    parse::scontrol_job(text, &JobId::try_from("7").unwrap()).unwrap()
}

#[test]
fn the_id_and_the_time_or_any_mark() {
    let pods = Path::new(PODS);
    let ours = |ownership| matches!(ownership, Ownership::Ours(_));
    let nothing = own(None, None);
    assert!(ours(judge(&row("knoc-u"), &nothing, pods)));
    assert_eq!(judge(&row("mine"), &nothing, pods), Ownership::Doubt);
    assert_eq!(judge(&row("knoc-v"), &nothing, pods), Ownership::Stranger);
    for (began, ended, expected) in [
        (0, 0, true),
        (1, 60, true),
        (-60, -1, true),
        (2, 60, false),
        (-60, -2, false),
    ] {
        let job = own(Some((SUBMITTED + began, SUBMITTED + ended)), None);
        assert_eq!(
            ours(judge(&row("mine"), &job, pods)),
            expected,
            "{began} {ended}"
        );
    }
    // Once the job was seen, only its own submit time counts.
    let seen = own(Some((SUBMITTED, SUBMITTED)), Some(SUBMITTED - 1));
    assert_eq!(judge(&row("mine"), &seen, pods), Ownership::Doubt);
    assert!(ours(judge(&row("mine"), &own(None, Some(SUBMITTED)), pods)));
}

/// The clocks of the login node and of the controller may be minutes apart.
#[test]
fn the_call_is_compared_by_the_controllers_clock() {
    let pods = Path::new(PODS);
    let ours = |ahead, call: i64| {
        let job = own(Some((call, call)), None);
        matches!(
            decide(&row("mine"), &detail(), &job, pods, ahead),
            Ownership::Ours(_)
        )
    };
    assert!(ours(Some(120), SUBMITTED - 120));
    assert!(ours(Some(-120), SUBMITTED + 120));
    assert!(!ours(Some(120), SUBMITTED));
    assert!(!ours(None, SUBMITTED - 120));
}

#[test]
fn a_requeued_job_has_a_later_submit_time_and_a_count() {
    let pods = Path::new(PODS);
    let decided = |restarts, known| {
        let detail = Detail {
            restarts,
            ..detail()
        };
        let job = own(None, Some(known));
        matches!(
            decide(&row("mine"), &detail, &job, pods, None),
            Ownership::Ours(_)
        )
    };
    assert!(decided(1, SUBMITTED - 10));
    assert!(!decided(0, SUBMITTED - 10));
    assert!(!decided(1, SUBMITTED + 10));
}
