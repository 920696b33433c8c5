//! Images: pulls that fail, and names that cannot be pulled.

use super::*;

#[test]
fn a_failed_pull_is_shown_then_backed_off_then_tried_again() {
    let failed = Event::StageFailed {
        container: "main".to_owned(),
        image: "x:1".to_owned(),
        reason: "ErrImagePull".to_owned(),
        message: "no such image".to_owned(),
    };
    let reason = |pod: &Pod| pod.trouble().unwrap().failure.reason.clone();
    let (pod, _) = feed([Event::Begin, failed.clone()]);
    assert_eq!(reason(&pod), "ErrImagePull");
    let (pod, effects) = step(pod.clone(), Event::Tick, pod.wake().unwrap());
    assert_eq!(
        (reason(&pod).as_str(), effects.len()),
        ("ImagePullBackOff", 0)
    );
    let notes = pod.notes.iter().map(|note| {
        assert_eq!(note.container, "main");
        (note.warning, note.reason.as_str(), note.message.as_str())
    });
    assert_eq!(
        notes.collect::<Vec<_>>(),
        [
            (
                true,
                "Failed",
                "Failed to pull image \"x:1\": no such image"
            ),
            (true, "Failed", "Error: ErrImagePull"),
            (false, "BackOff", "Back-off pulling image \"x:1\""),
            (true, "Failed", "Error: ImagePullBackOff"),
        ]
    );
    assert_eq!(
        pod.trouble().unwrap().failure.message,
        "Back-off pulling image \"x:1\": ErrImagePull: no such image"
    );
    let due = pod.wake().unwrap();
    assert!((at(9)..=at(11)).contains(&due), "{due}");
    let (pod, effects) = step(pod, Event::Tick, due);
    assert_eq!(effects, [Effect::Stage]);
    // The same failure takes the place of the one before, and other credentials end the pause.
    let (pod, _) = step(pod, failed, due);
    let counts = pod.notes.iter().map(|note| note.count);
    assert_eq!(counts.collect::<Vec<_>>(), [1, 1, 1, 1]);
    let (pod, effects) = step(pod, Event::LookAgain, due);
    assert_eq!(effects, [Effect::Stage]);
    assert_eq!(pod.trouble(), None);
}

#[test]
fn names_and_policies_that_bring_no_image_are_reported_as_by_a_kubelet() {
    let of = |reason: &str| {
        let failed = Event::StageFailed {
            container: "main".to_owned(),
            image: "X".to_owned(),
            reason: reason.to_owned(),
            message: "why".to_owned(),
        };
        let (pod, _) = feed([Event::Begin, failed]);
        let notes = pod.notes.into_iter();
        let notes = notes.map(|note| format!("{}: {}", note.reason, note.message));
        notes.collect::<Vec<_>>()
    };
    assert_eq!(
        of("InvalidImageName"),
        ["InspectFailed: why", "Failed: Error: InvalidImageName"]
    );
    assert_eq!(
        of("ErrImageNeverPull"),
        ["ErrImageNeverPull: why", "Failed: Error: ErrImageNeverPull"]
    );
}
