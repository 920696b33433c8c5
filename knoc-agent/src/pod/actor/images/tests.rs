use std::time::Duration;

use super::*;

fn spec(image: &str) -> pb::PodSpec {
    pb::PodSpec {
        containers: vec![pb::Container {
            name: "main".to_owned(),
            image: image.to_owned(),
            ..pb::Container::default()
        }],
        ..pb::PodSpec::default()
    }
}

fn report(image: &str, next: &str) -> pb::Report {
    pb::Report {
        capabilities: vec![capability::IMAGE_UPDATES.to_owned()],
        containers: vec![pb::ContainerStatus {
            name: "main".to_owned(),
            image: image.to_owned(),
            next_image: next.to_owned(),
            ..pb::ContainerStatus::default()
        }],
        ..pb::Report::default()
    }
}

fn resolved(image: &str) -> pb::ResolvedImage {
    pb::ResolvedImage {
        container: "main".to_owned(),
        image: image.to_owned(),
        ..pb::ResolvedImage::default()
    }
}

fn due(updates: &Updates, report: Option<pb::Report>, image: &str) -> &'static str {
    match updates.due(&Pod::that_reports(report), &spec(image)).pop() {
        None => "nothing",
        Some(Next::Find(_)) => "find",
        Some(Next::Tell(_)) => "tell",
        Some(Next::Impossible(_)) => "impossible",
    }
}

#[test]
fn an_image_is_looked_up_then_staged_then_told_until_the_shim_has_it() {
    let mut updates = Updates::default();
    assert_eq!(due(&updates, None, "b"), "nothing", "it is not staged yet");
    updates.staged([&resolved("a")]);
    assert_eq!(due(&updates, None, "a"), "nothing");
    assert_eq!(
        due(&updates, None, "b"),
        "find",
        "the job waits in the queue"
    );
    assert_eq!(due(&updates, Some(report("a", "")), "b"), "find");
    updates.found.insert("main".to_owned(), resolved("b"));
    updates.staged([&resolved("b")]);
    assert_eq!(
        due(&updates, None, "b"),
        "nothing",
        "the job starts with it"
    );
    assert_eq!(due(&updates, Some(report("a", "")), "b"), "tell");
    assert_eq!(due(&updates, Some(report("a", "b")), "b"), "nothing");
    assert_eq!(due(&updates, Some(report("b", "")), "b"), "nothing");
    updates.told.insert("main".to_owned(), "b".to_owned());
    assert_eq!(
        due(&updates, Some(report("a", "")), "b"),
        "nothing",
        "its report is awaited"
    );
    updates.told.clear();
    // It changes once more.
    assert_eq!(due(&updates, Some(report("a", "b")), "c"), "find");
    // After a restart of the agent.
    updates.found.clear();
    assert_eq!(due(&updates, Some(report("a", "")), "b"), "find");
}

#[test]
fn locations_of_an_older_agent_keep_the_image_of_the_shape_that_they_were_found_for() {
    let mut job = pb::JobFile {
        spec: Some(spec("a")),
        images: vec![resolved(""), pb::ResolvedImage::default()],
        ..pb::JobFile::default()
    };
    name_images(&mut job);
    let names: Vec<_> = job.images.iter().map(|one| one.image.as_str()).collect();
    assert_eq!(names, ["a", ""]);
    job.spec = Some(spec("b"));
    name_images(&mut job);
    assert_eq!(job.images[0].image, "a");
}

/// The names of the containers for which something is to be done.
fn names(updates: &Updates, spec: &pb::PodSpec) -> String {
    let due = updates.due(&Pod::that_reports(None), spec);
    let names: Vec<_> = due.iter().map(|next| &*next.container().name).collect();
    names.join(" ")
}

async fn finds(container: &str, seconds: u64) -> Step {
    let error = StageError {
        container: container.to_owned(),
        image: String::new(),
        reason: "ErrImagePull".to_owned(),
        message: String::new(),
    };
    tokio::time::sleep(Duration::from_secs(seconds)).await;
    Step::Found {
        container: container.to_owned(),
        image: Err(error),
    }
}

#[tokio::test(start_paused = true)]
async fn a_container_whose_image_takes_long_or_fails_holds_up_no_other() {
    let mut updates = Updates::default();
    let mut spec = spec("b");
    let other = pb::Container {
        name: "other".to_owned(),
        ..spec.containers[0].clone()
    };
    spec.containers.push(other);
    let resolved_other = |image: &str| pb::ResolvedImage {
        container: "other".to_owned(),
        ..resolved(image)
    };
    updates.staged([&resolved("a"), &resolved_other("a")]);
    assert_eq!(names(&updates, &spec), "main other");
    assert!(updates.fails("main", "no"));
    updates.tasks.start("main".to_owned(), finds("main", 300));
    assert_eq!(names(&updates, &spec), "other");
    updates.tasks.start("other".to_owned(), finds("other", 1));
    assert_eq!(names(&updates, &spec), "");
    let next = updates.next().await;
    assert!(
        matches!(&next, Some(Step::Found { container, .. }) if container == "other"),
        "{next:?}"
    );
    assert_eq!(names(&updates, &spec), "other", "it is tried again");
    assert!(updates.looks_for_image(&Pod::that_reports(None), &spec));
    updates.staged([&resolved_other("b")]);
    assert_eq!(names(&updates, &spec), "");
    // New credentials end the pause of the one that failed.
    updates.retry_now();
    assert_eq!(names(&updates, &spec), "main");
    updates.staged([&resolved("b")]);
    assert!(!updates.looks_for_image(&Pod::that_reports(None), &spec));
}

#[tokio::test(start_paused = true)]
async fn another_image_ends_only_what_was_under_way_for_its_container() {
    let mut updates = Updates::default();
    let before = pb::PodSpec {
        init_containers: vec![pb::Container {
            name: "other".to_owned(),
            image: "x".to_owned(),
            ..pb::Container::default()
        }],
        ..spec("b")
    };
    let now = pb::PodSpec {
        containers: spec("c").containers,
        ..before.clone()
    };
    for name in ["main", "other"] {
        assert!(updates.fails(name, "no"));
        updates.tasks.start(name.to_owned(), finds(name, 300));
    }
    updates.renamed(&before, &now);
    assert!(!updates.tasks.is_busy("main") && updates.tasks.is_busy("other"));
    assert_eq!((updates.tries("main"), updates.tries("other")), (0, 1));
    // A new link ends the pause of what the shim is told only.
    updates.tasks.start("main".to_owned(), finds("main", 300));
    updates.telling.insert("main".to_owned());
    updates.linked();
    assert!(!updates.tasks.is_busy("main") && updates.tasks.is_busy("other"));
}

#[test]
fn a_job_of_an_older_version_is_told_nothing_and_that_is_said_once() {
    let mut updates = Updates::default();
    updates.staged([&resolved("a")]);
    let old = pb::Report {
        capabilities: Vec::new(),
        ..report("a", "")
    };
    assert_eq!(due(&updates, Some(old.clone()), "b"), "impossible");
    // The image could not be found while the job was in the queue.
    assert!(updates.fails("main", "no"));
    assert_eq!(due(&updates, Some(old.clone()), "b"), "impossible");
    updates.impossible.insert("main".to_owned(), "b".to_owned());
    assert_eq!(due(&updates, Some(old.clone()), "b"), "nothing");
    assert_eq!(due(&updates, Some(old), "c"), "impossible");
    assert!(!updates.fails("main", "no"));
    assert!(updates.fails("main", "another reason"));
}

#[test]
fn the_kubelet_learns_that_a_job_of_an_older_version_takes_no_image() {
    let updates = Updates::default();
    let fixed = |report: Option<pb::Report>| {
        let mut observed = pb::PodObserved::default();
        updates.show(&Pod::that_reports(report), &mut observed);
        observed.images_are_fixed
    };
    assert!(!fixed(None) && !fixed(Some(report("a", ""))));
    let old = pb::Report {
        capabilities: Vec::new(),
        ..report("a", "")
    };
    assert!(fixed(Some(old)));
}

#[test]
fn a_job_that_waits_is_shown_with_the_image_from_which_it_would_start() {
    let mut updates = Updates::default();
    let shown = |updates: &Updates, report: Option<pb::Report>| {
        let status = pb::ContainerStatus {
            name: "main".to_owned(),
            image: "b".to_owned(),
            ..pb::ContainerStatus::default()
        };
        let mut observed = pb::PodObserved {
            containers: vec![status],
            ..pb::PodObserved::default()
        };
        updates.show(&Pod::that_reports(report), &mut observed);
        observed.containers[0].image.clone()
    };
    assert_eq!(shown(&updates, None), "b", "nothing is staged yet");
    updates.staged([&resolved("a")]);
    assert_eq!(shown(&updates, None), "a", "the other one is not there yet");
    updates.staged([&resolved("b")]);
    assert_eq!(shown(&updates, None), "b");
    updates.staged([&resolved("c")]);
    let said = Some(report("b", "c"));
    assert_eq!(shown(&updates, said), "b", "the shim knows what runs");
}

#[test]
fn nothing_is_done_for_a_pod_that_ends() {
    let mut updates = Updates::default();
    updates.staged([&resolved("a")]);
    let last = pb::Report {
        r#final: true,
        ..report("a", "")
    };
    assert_eq!(due(&updates, Some(last), "b"), "nothing");
}
