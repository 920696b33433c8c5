use proptest::prelude::*;

use super::*;

fn phases() -> impl Strategy<Value = PodPhase> {
    prop::sample::select(vec![
        PodPhase::Unspecified,
        PodPhase::Accepted,
        PodPhase::Staging,
        PodPhase::Throttled,
        PodPhase::Submitting,
        PodPhase::Queued,
        PodPhase::Running,
        PodPhase::Stopping,
        PodPhase::Lost,
        PodPhase::Finished,
    ])
}

fn agents() -> impl Strategy<Value = AgentSide> {
    prop_oneof![
        Just(AgentSide::Unknown),
        Just(AgentSide::Absent),
        (phases(), 1..4i64, any::<bool>()).prop_map(|(phase, generation, deleting)| {
            AgentSide::Known {
                phase,
                generation,
                deleting,
            }
        }),
    ]
}

fn seconds(seconds: i64) -> Grace {
    Grace::of_field(Some(seconds))
}

fn graces() -> impl Strategy<Value = Grace> {
    (0..60i64).prop_map(seconds)
}

prop_compose! {
    fn presents()(
        generation in 1..4i64, terminal: bool, ran: bool, rejected: bool, mirror in prop::bool::weighted(0.1),
        deletion in prop::option::of(graces()),
    ) -> Present {
        Present { generation, terminal, ran, deletion, rejected, mirror }
    }
}

fn desireds() -> impl Strategy<Value = Desired> {
    prop_oneof![
        1 => Just(Desired::Unseen),
        2 => Just(Desired::Gone),
        8 => presents().prop_map(Desired::Present),
    ]
}

prop_compose! {
    fn dones()(ensured in 0..4i64, stop in prop::option::of(graces()), refresh_due: bool) -> Done {
        Done { ensured, stop, refresh_due }
    }
}

proptest! {
    #[test]
    fn a_pod_is_ensured_only_if_it_may_run(desired in desireds(), agent in agents(), done in dones()) {
        if decide(desired, agent, done) == Decision::Ensure {
            let Desired::Present(pod) = desired else { panic!("not there") };
            prop_assert!(!pod.terminal && pod.deletion.is_none() && !pod.mirror);
            prop_assert!(agent != AgentSide::Unknown);
            // A pod that ran and that the agent does not know never runs again.
            prop_assert!(agent != AgentSide::Absent || (!pod.ran && !pod.rejected));
        }
    }

    #[test]
    fn nothing_is_released_while_a_job_may_run(desired in desireds(), agent in agents(), done in dones()) {
        let lives = match agent {
            AgentSide::Unknown => !matches!(desired, Desired::Present(Present { rejected: true, .. })),
            AgentSide::Absent => false,
            AgentSide::Known { phase, .. } => phase != PodPhase::Finished,
        };
        if lives {
            let decision = decide(desired, agent, done);
            prop_assert!(!matches!(decision, Decision::Release | Decision::Forget | Decision::Drop), "{decision:?}");
        }
    }

    /// Clients that wait for the end of a pod (a Job, a drain) must see how it ended before the object is gone.
    #[test]
    fn nothing_is_released_before_its_terminal_phase_is_published(pod in presents(), agent in agents(), done in dones()) {
        if decide(Desired::Present(pod), agent, done) == Decision::Release {
            prop_assert!(pod.terminal, "{pod:?} {agent:?}");
        }
    }

    #[test]
    fn what_was_never_seen_is_never_ended(agent in agents(), done in dones()) {
        let decision = decide(Desired::Unseen, agent, done);
        prop_assert!(matches!(decision, Decision::Wait | Decision::Drop));
    }

    #[test]
    fn nothing_is_done_to_the_agent_before_both_lists(desired in desireds(), done in dones()) {
        let decision = decide(desired, AgentSide::Unknown, done);
        prop_assert!(matches!(decision, Decision::Wait | Decision::Reject | Decision::Release), "{decision:?}");
    }

    /// The API server, the agent and decide in a loop: a deleted pod always disappears from both sides.
    #[test]
    fn deletion_always_ends(pod in presents(), agent in agents(), done in dones(), force: bool) {
        let grace = pod.deletion.unwrap_or_else(|| Grace::of_field(None));
        let mut desired = if force {
            Desired::Gone
        } else {
            Desired::Present(Present { deletion: Some(grace), mirror: false, ..pod })
        };
        let mut agent = if agent == AgentSide::Unknown { AgentSide::Absent } else { agent };
        let mut done = done;
        for _ in 0..9 {
            match decide(desired, agent, done) {
                Decision::Wait => {
                    // Time passes: a job that was stopped ends.
                    let AgentSide::Known { deleting: true, generation, .. } = agent else {
                        panic!("waits for nothing: {desired:?} {agent:?} {done:?}");
                    };
                    agent = AgentSide::Known { phase: PodPhase::Finished, generation, deleting: true };
                }
                Decision::Stop(grace) => {
                    let AgentSide::Known { phase, generation, .. } = agent else { panic!("stop of nothing") };
                    done.stop = Some(done.stop.map_or(grace, |told| told.min(grace)));
                    agent = AgentSide::Known { phase, generation, deleting: true };
                }
                Decision::Release => desired = Desired::Gone,
                Decision::Forget => agent = AgentSide::Absent,
                Decision::Drop => return Ok(()),
                Decision::Reject | Decision::MarkLost | Decision::Settle => {
                    let Desired::Present(pod) = desired else { panic!("a phase of nothing") };
                    desired = Desired::Present(Present { terminal: true, ..pod });
                }
                other @ (Decision::Ensure | Decision::Refresh) => {
                    panic!("{other:?} for a deleted pod")
                },
            }
        }
        prop_assert!(false, "no end: {desired:?} {agent:?} {done:?}");
    }
}

#[test]
fn a_shorter_grace_is_told_again() {
    let pod = Present {
        generation: 1,
        terminal: false,
        ran: true,
        deletion: Some(seconds(5)),
        rejected: false,
        mirror: false,
    };
    let agent = AgentSide::Known {
        phase: PodPhase::Stopping,
        generation: 1,
        deleting: true,
    };
    let told = |stop| {
        decide(
            Desired::Present(pod),
            agent,
            Done {
                stop,
                ..Done::default()
            },
        )
    };
    assert_eq!(told(Some(seconds(30))), Decision::Stop(seconds(5)));
    assert_eq!(told(Some(seconds(5))), Decision::Wait);
    assert_eq!(told(None), Decision::Stop(seconds(5)));
}
