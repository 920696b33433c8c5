//! Tests of what the cache keeps and what it removes.

use knoc_contract::jobdir::JobDir;
use knoc_proto::pb;

use super::*;

/// A registry with the images `library/image-0` and so on, whose SIF files have a thousand bytes.
async fn world(limit: u64) -> World {
    let content = (0..5).fold(Content::default(), |content, number| {
        let name = format!("image-{number}");
        content.with(&format!("library/{name}"), &[tar(&name, b"")])
    });
    let registry = FakeRegistry::start(move |ask| content.answer(ask)).await;
    let dir = tempfile::tempdir().unwrap();
    let program = dir.path().join("apptainer");
    write_program(&program, "head -c 10000 /dev/zero >image.sif\n");
    let mut settings = settings(dir.path(), &registry.address, program);
    settings.limits.cache = limit;
    World {
        dir,
        registry,
        off: Arc::default(),
        images: Images::new(settings),
    }
}

impl World {
    async fn pull(&self, number: usize) -> Result<ResolvedImage, ImageError> {
        let name = format!("image-{number}");
        self.images
            .resolve(&name, PullPolicy::IfNotPresent, &[])
            .await
    }

    fn job(&self, uid: &str, image: &ResolvedImage) -> JobDir {
        let uid = knoc_proto::ids::PodUid::try_from(uid).unwrap();
        let job = self.images.settings().state.pod(&uid);
        job.create().unwrap();
        let images = vec![pb::ResolvedImage {
            path: image.path.display().to_string(),
            ..pb::ResolvedImage::default()
        }];
        let file = pb::JobFile {
            images,
            ..pb::JobFile::default()
        };
        job.write_spec(&file).unwrap();
        job
    }

    /// Sets the last use of an image to so many hours ago.
    fn age(image: &ResolvedImage, hours: i64) {
        let json = image.path.with_extension("json");
        let time = jiff::Timestamp::now() - jiff::SignedDuration::from_hours(hours);
        let file = std::fs::File::open(json).unwrap();
        file.set_modified(time.into()).unwrap();
    }
}

#[tokio::test]
async fn the_cache_lets_go_of_what_was_not_used_for_longest_and_never_of_what_is_in_use() {
    // Room for three SIF files and for what a pull reserves.
    let world = world(34_000).await;
    let uids = [
        "11111111-1111-4111-8111-111111111111",
        "22222222-2222-4222-8222-222222222222",
    ];
    let mut paths = Vec::new();
    for number in 0..3 {
        let image = world.pull(number).await.unwrap();
        World::age(&image, 10 - i64::try_from(number).unwrap());
        paths.push(image.path.clone());
        if number == 0 {
            // The oldest one belongs to a job that is running; its agent has restarted since.
            world.job(uids[0], &image);
        }
    }
    world.pull(3).await.unwrap();
    assert!(paths[0].exists(), "a job uses it");
    assert!(!paths[1].exists(), "the oldest of the others");
    assert!(paths[2].exists(), "there was enough room");
    // A use is recorded, so the oldest image is now the one that was not used.
    let used = world.pull(2).await.unwrap();
    drop(used);
    let third = world.pull(3).await.unwrap();
    World::age(&third, 5);
    let path = third.path.clone();
    drop(third);
    world.pull(4).await.unwrap();
    assert!(paths[2].exists() && !path.exists());
    // Its name was removed too, and the image can be pulled again.
    let asked = world.registry.seen.count("HEAD", "image-1");
    let again = world.pull(1).await.unwrap();
    assert!(again.path.exists());
    assert_eq!(world.registry.seen.count("HEAD", "image-1"), asked + 1);
}

#[tokio::test]
async fn an_image_stays_from_its_resolution_until_a_job_directory_names_it() {
    let world = world(24_000).await;
    let first = world.pull(0).await.unwrap();
    let second = world.pull(1).await.unwrap();
    let rejected = world.pull(2).await.unwrap_err();
    assert!(
        rejected
            .message
            .contains("limits.image_cache of the site file is 24000"),
        "{rejected}"
    );
    assert!(rejected.retryable());
    assert!(first.path.exists() && second.path.exists());
    let path = first.path.clone();
    let job = world.job("33333333-3333-4333-8333-333333333333", &first);
    drop(first);
    drop(second);
    world.pull(2).await.unwrap();
    assert!(path.exists(), "the job directory took over");
    job.remove().unwrap();
    let names = [0, 3, 4];
    for number in names {
        world.pull(number).await.unwrap();
    }
    let kept = world.images.cache().usage();
    assert!(kept.1 <= 24_000, "{kept:?}");
}

#[tokio::test]
async fn a_job_directory_that_cannot_be_read_keeps_everything() {
    let world = world(14_000).await;
    let image = world.pull(0).await.unwrap();
    let job = world.job("44444444-4444-4444-8444-444444444444", &image);
    let path = image.path.clone();
    drop(image);
    knoc_contract::jobdir::atomic::write(&job.spec_path(), b"\xff\xff\xff", 0o600).unwrap();
    let rejected = world.pull(1).await.unwrap_err();
    assert!(
        rejected.message.contains("the image cache is full"),
        "{rejected}"
    );
    assert!(path.exists());
}

#[tokio::test]
async fn what_failed_pulls_left_is_swept_at_the_start() {
    let world = world(1 << 30).await;
    let image = world.pull(0).await.unwrap();
    let folder = world.images.settings().state.images();
    let left = folder.join(".tmp/0123/rootfs/closed");
    std::fs::create_dir_all(&left).unwrap();
    std::fs::File::create(left.join("file")).unwrap();
    std::fs::set_permissions(&left, PermissionsExt::from_mode(0o500)).unwrap();
    for name in ["sha256-ab.json", "sha256-cd.sif", ".sha256-ef.json.tmp"] {
        std::fs::File::create(folder.join(name)).unwrap();
    }
    world.images.sweep();
    let mut names: Vec<_> = std::fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    let stem = image.path.file_stem().unwrap().to_str().unwrap();
    assert_eq!(
        names,
        [
            format!("{stem}.json"),
            format!("{stem}.sif"),
            "tags.json".to_owned()
        ]
    );
}

#[tokio::test]
async fn a_conversion_that_outlived_its_agent_ends_at_the_next_start() {
    let world = world(1 << 30).await;
    let left = world
        .images
        .settings()
        .state
        .images()
        .join(".tmp/0123456789abcdef");
    std::fs::create_dir_all(&left).unwrap();
    let (ready, soon) = (left.join("ready"), Duration::from_secs(20));
    let conversion = crate::command::Command::new("/bin/sh")
        .args(["-c", ": >ready; exec /bin/sleep 600"])
        .current_dir(&left)
        .deadline(2 * soon);
    let next = async {
        let look = async {
            while !ready.exists() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(soon, look).await.unwrap();
        world.images.sweep();
    };
    let (ended, ()) = tokio::join!(conversion.run(), next);
    let kind = ended.unwrap_err().kind;
    let killed = crate::command::CommandErrorKind::Exit {
        code: None,
        signal: Some(9),
        stdout: String::new(),
        stderr: String::new(),
    };
    assert_eq!(kind.to_string(), killed.to_string());
    assert!(!left.exists());
}

#[tokio::test]
async fn what_a_conversion_needs_counts_before_it_begins() {
    // An image of some 1700 bytes by its manifest, of as many when unpacked, and of 10,000 as a SIF file.
    let world = world(8000).await;
    let refused = world.pull(0).await.unwrap_err();
    assert!(
        refused.message.contains("that pulls in progress need")
            && refused
                .message
                .contains("limits.image_cache of the site file is 8000"),
        "{refused}"
    );
    assert!(refused.retryable());
    // It fits into no cache of this size, so that no other image has to make place for it.
    let cache = world.images.cache();
    assert!(!cache.refused_within(Duration::from_mins(1)));
    // What it had reserved is free again, and its layers are gone.
    assert_eq!(world.images.cache().claims().reserved, 0);
    let temporary = world.images.cache().temporary();
    let gone = async {
        while std::fs::read_dir(&temporary).unwrap().next().is_some() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let soon = Duration::from_secs(20);
    tokio::time::timeout(soon, gone).await.unwrap();
}

#[tokio::test]
async fn what_could_never_fit_removes_nothing() {
    let world = world(20_000).await;
    let (one, used) = (world.pull(0).await.unwrap(), world.pull(1).await.unwrap());
    let path = one.path.clone();
    drop(one);
    // Nearly all room is taken by an image in use and by a pull.
    let cache = Arc::clone(world.images.cache());
    let reserved = cache.reserve(9000, 20_000);
    assert!(!path.exists(), "there is room without it");
    let refused = world.pull(2).await.unwrap_err();
    assert!(refused.message.contains("limits.image_cache"), "{refused}");
    assert!(cache.refused_within(Duration::from_mins(1)));
    drop(reserved);
    let again = world.pull(2).await.unwrap();
    let path = again.path.clone();
    drop(again);
    let refused = cache.reserve(11_000, 20_000).unwrap_err();
    assert!(refused.contains("would hold 21000 bytes"), "{refused}");
    assert!(path.exists(), "its removal would not suffice");
    drop(used);
}

#[tokio::test]
async fn always_asks_for_the_digest_alone_also_of_an_index() {
    let text = manifest();
    let digest = digest(&text);
    let index = format!(
        r#"{{"schemaVersion":2,"manifests":[{{"digest":"{digest}","size":1,"platform":{{"os":"linux","architecture":"{}"}}}}]}}"#,
        if cfg!(target_arch = "aarch64") {
            "arm64"
        } else {
            "amd64"
        }
    );
    let content = one().text("library/many", index);
    let registry = FakeRegistry::start(move |ask| {
        if ask.path.contains(&format!("many/manifests/{digest}")) {
            return Reply::ok(text.clone());
        }
        content.answer(ask)
    });
    let registry = registry.await;
    let dir = tempfile::tempdir().unwrap();
    let images = images(dir.path(), &registry.address);
    let first = images
        .resolve("many", PullPolicy::Always, &[])
        .await
        .unwrap();
    assert!(
        first.image_id.ends_with(&super::digest(&manifest())),
        "the image's digest, not the index's"
    );
    let before = registry.seen.count("GET", "");
    let again = images
        .resolve("many", PullPolicy::Always, &[])
        .await
        .unwrap();
    assert_eq!(again.image_id, first.image_id);
    assert_eq!(
        registry.seen.count("GET", ""),
        before,
        "nothing was fetched"
    );
}

#[tokio::test]
async fn of_several_variants_the_common_one_is_pulled_also_through_two_indexes() {
    let architecture = super::super::super::manifest::ARCHITECTURE;
    let (text, other) = (manifest(), fake::manifest(&[]));
    let entry = |digest: &str, platform: &str| {
        format!(r#"{{"digest":"{digest}","size":1,"platform":{{"os":"linux",{platform}}}}}"#)
    };
    let of = |variant: &str| format!(r#""architecture":"{architecture}","variant":"{variant}""#);
    let plain = format!(r#""architecture":"{architecture}""#);
    let entries = [
        entry(&digest("attestation"), r#""architecture":"unknown""#),
        entry(&digest(&other), &of("v3")),
        entry(&digest(&text), &plain),
        entry(&digest(&other), &of("v2")),
    ];
    let inner = format!(
        r#"{{"schemaVersion":2,"manifests":[{}]}}"#,
        entries.join(",")
    );
    let outer = format!(
        r#"{{"schemaVersion":2,"manifests":[{}]}}"#,
        entry(&digest(&inner), &plain)
    );
    let names_itself = format!(
        r#"{{"schemaVersion":2,"manifests":[{}]}}"#,
        entry(&digest("self"), &plain)
    );
    let content = one()
        .text("library/many", outer)
        .text("library/loop", names_itself.clone());
    let registry = FakeRegistry::start(move |ask| {
        for text in [&text, &inner] {
            if ask.path.ends_with(&digest(text)) {
                return Reply::ok(text.clone());
            }
        }
        content.answer(ask)
    });
    let registry = registry.await;
    let dir = tempfile::tempdir().unwrap();
    let images = images(dir.path(), &registry.address);
    let found = images.resolve("many", PullPolicy::Always, &[]).await;
    let expected = digest(&manifest());
    assert!(found.unwrap().image_id.ends_with(&expected));
    // Content that is not what its digest says ends a loop of indexes at once.
    let error = images.resolve("loop", PullPolicy::Always, &[]).await;
    let error = error.unwrap_err();
    assert!(error.message.contains("instead of"), "{error}");
}
