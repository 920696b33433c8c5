//! Images on the real stack: an image's configuration and what a pod overrides, pull policies with a tag that moves, and the
//! registry's own reason if there is no image.

use anyhow::{Context as _, ensure};
use k8s_openapi::api::core::v1::Pod;
use knoc_tests::{
    PodBuilder, World,
    repository::{PULLED, Repository, image},
    wait_for,
    world::{SOON, container_reason, why},
};
use serde_json::{Value, json};

/// The configuration of the image `own:1` as its script prints it: entrypoint, arguments, folder, variables.
const OWN: &str = "[/bin/show][entry][cmd][two words] in /srv/own, colour=blue size=7\n";

/// The image's own configuration, without a command of the builder.
fn as_it_is(pod: PodBuilder, image: &str) -> PodBuilder {
    pod.image(image).set("command", Value::Null)
}

#[tokio::test]
async fn an_image_runs_as_it_says_and_a_pod_overrides_each_part() -> anyhow::Result<()> {
    let world = World::new("own-image").await?;
    let own = image("own:1");
    let pod = PodBuilder::new("parts");
    let pod = as_it_is(pod, &own);
    let pod = as_it_is(pod.container("args"), &own).set("args", json!(["mine", "a b"]));
    let pod = as_it_is(pod.container("command"), &own).set("command", json!(["/bin/show", "x"]));
    let pod = as_it_is(pod.container("both"), &own)
        .set("command", json!(["/bin/show", "x"]))
        .set("args", json!(["y"]));
    let pod = as_it_is(pod.container("values"), &own)
        .set("env", json!([{"name": "COLOUR", "value": "green"}]))
        .set("workingDir", json!("/tmp"));
    // The same for an image file, which contains its configuration.
    let pod = as_it_is(pod.container("file"), "/images/own.sif");
    world.create(&pod).await?;
    world.wait_phase("parts", "Succeeded", PULLED).await?;
    let rest = " in /srv/own, colour=blue size=7\n";
    for (container, wanted) in [
        ("main", OWN.to_owned()),
        ("args", format!("[/bin/show][entry][mine][a b]{rest}")),
        ("command", format!("[/bin/show][x]{rest}")),
        ("both", format!("[/bin/show][x][y]{rest}")),
        (
            "values",
            "[/bin/show][entry][cmd][two words] in /tmp, colour=green size=7\n".to_owned(),
        ),
        ("file", OWN.to_owned()),
    ] {
        let log = world.logs("parts", container).await?;
        ensure!(log == wanted, "{container}: {log:?} instead of {wanted:?}");
    }
    world.finish().await
}

/// Runs a pod with the repository's image and that policy; returns its log and the digest in its status.
async fn pulled(
    repository: &Repository<'_>,
    name: &str,
    policy: &str,
) -> anyhow::Result<(String, String)> {
    let pod = as_it_is(PodBuilder::new(name), &repository.image());
    let world = repository.world;
    world
        .create(&pod.set("imagePullPolicy", json!(policy)))
        .await?;
    let ended = world.wait_phase(name, "Succeeded", PULLED).await?;
    Ok((world.logs(name, "main").await?, digest(&ended)?))
}

fn digest(pod: &Pod) -> anyhow::Result<String> {
    let status = pod
        .status
        .as_ref()
        .and_then(|status| status.container_statuses.as_ref());
    let id = status
        .and_then(|all| all.first())
        .map(|one| one.image_id.as_str());
    let (_, digest) = id
        .and_then(|id| id.split_once('@'))
        .with_context(|| format!("image id {id:?}"))?;
    Ok(digest.to_owned())
}

#[tokio::test]
async fn if_not_present_stays_and_always_follows_a_tag_that_moves() -> anyhow::Result<()> {
    let world = World::new("moving-tag").await?;
    let tag = Repository::new(&world);
    tag.becomes("1").await?;
    let first = tag.inspect().await?["Digest"].clone();
    let (log, kept) = pulled(&tag, "first", "IfNotPresent").await?;
    ensure!(log == OWN && first == *kept, "{log}, {kept} of {first}");
    tag.becomes("2").await?;
    let second = tag.inspect().await?["Digest"].clone();
    ensure!(first != second, "the versions do not differ");
    let (log, kept) = pulled(&tag, "stays", "IfNotPresent").await?;
    ensure!(log == OWN && first == *kept, "{log}, {kept} of {first}");
    let red = OWN.replace("blue", "red");
    for (name, policy) in [
        ("follows", "Always"),
        ("then", "IfNotPresent"),
        ("never", "Never"),
    ] {
        let (log, kept) = pulled(&tag, name, policy).await?;
        ensure!(
            log == red && second == *kept,
            "{name}: {log}, {kept} of {second}"
        );
    }
    tag.remove().await?;
    world.finish().await
}

/// Waits until the pod's container is waiting with that reason; returns its message.
async fn waits_by(world: &World, name: &str, reason: &str) -> anyhow::Result<String> {
    world
        .wait_for_state(name, reason, PULLED, |pod| {
            let (is, message) = container_reason(pod, "main")?;
            (is == reason).then_some(message)
        })
        .await
}

/// Waits until the pod's container could not pull its image since that version; returns the message. This reason stays for a second,
/// and is back with the next attempt.
async fn cannot_pull(world: &World, name: &str, since: &str) -> anyhow::Result<String> {
    let cannot = |pod: &Pod| {
        let (is, message) = container_reason(pod, "main")?;
        (is == "ErrImagePull").then_some(message)
    };
    world.saw(name, since, PULLED, cannot).await
}

/// Checks that there is also an Event that contains these texts.
async fn told(world: &World, name: &str, expected: &[&str]) -> anyhow::Result<()> {
    wait_for(
        &format!("an Event of {name} with {expected:?}"),
        SOON,
        async || {
            let events = world.events(name).await?;
            let all = |event: &String| expected.iter().all(|word| event.contains(word));
            ensure!(events.iter().any(all), "{events:?}");
            Ok(())
        },
    )
    .await
}

#[tokio::test]
async fn never_waits_for_an_image_that_another_pod_brings() -> anyhow::Result<()> {
    let world = World::new("never").await?;
    let repository = Repository::new(&world);
    repository.becomes("1").await?;
    let pod = as_it_is(PodBuilder::new("never"), &repository.image());
    let uid = world
        .create(&pod.set("imagePullPolicy", json!("Never")))
        .await?;
    let message = waits_by(&world, "never", "ErrImageNeverPull").await?;
    ensure!(message.contains(&repository.image()), "{message}");
    told(&world, "never", &["ErrImageNeverPull: Container image"]).await?;
    told(&world, "never", &["Failed: Error: ErrImageNeverPull"]).await?;
    let jobs = world.jobs(&uid).await?;
    ensure!(jobs.is_empty(), "{jobs:?}");
    pulled(&repository, "brings", "IfNotPresent").await?;
    world.wait_phase("never", "Succeeded", PULLED).await?;
    let log = world.logs("never", "main").await?;
    ensure!(log == OWN, "{log}");
    world.one_job(&uid, "").await?;
    repository.remove().await?;
    world.finish().await
}

#[tokio::test]
async fn an_image_that_a_registry_lacks_is_reported_with_its_message() -> anyhow::Result<()> {
    let world = World::new("no-image").await?;
    let nobody = PodBuilder::image_name().replace("ctl:5000", "ctl:5009");
    let cases = [
        ("no-tag", image("busybox:nonesuch"), "manifest unknown"),
        ("no-registry", nobody, "Connection refused"),
    ];
    let since = world.version().await?;
    let mut uids = Vec::new();
    for (name, image, _) in &cases {
        uids.push(world.create(&PodBuilder::new(name).image(image)).await?);
    }
    for ((name, image, expected), uid) in cases.iter().zip(&uids) {
        let message = cannot_pull(&world, name, &since).await?;
        ensure!(
            message.contains(expected) && message.contains(image),
            "{name}: {message}"
        );
        let failed = format!("Failed: Failed to pull image \"{image}\": ");
        told(&world, name, &[&failed, expected]).await?;
        told(&world, name, &["Failed: Error: ErrImagePull"]).await?;
        let message = waits_by(&world, name, "ImagePullBackOff").await?;
        let back_off = format!("Back-off pulling image \"{image}\"");
        ensure!(
            message.starts_with(&back_off) && message.contains(expected),
            "{name}: {message}"
        );
        told(&world, name, &[&format!("BackOff: {back_off}")]).await?;
        told(&world, name, &["Failed: Error: ImagePullBackOff"]).await?;
        // No job was submitted for it, and its deletion is not delayed.
        let jobs = world.jobs(uid).await?;
        ensure!(jobs.is_empty(), "{name}: {jobs:?}");
        world.delete(name, None).await?;
        world.wait_gone(name, SOON).await?;
    }
    world.finish().await
}

#[tokio::test]
async fn a_missing_layer_is_reported_with_the_message_of_the_registry() -> anyhow::Result<()> {
    let world = World::new("no-pull").await?;
    let repository = Repository::new(&world);
    let folder = repository.push_one_of_its_own().await?;
    repository.lose_its_last_layer().await?;
    let pod = as_it_is(PodBuilder::new("broken"), &repository.image());
    let since = world.version().await?;
    world.create(&pod).await?;
    let message = cannot_pull(&world, "broken", &since).await?;
    ensure!(message.contains("blob unknown"), "{message}");
    told(
        &world,
        "broken",
        &["Failed: Failed to pull image", "blob unknown"],
    )
    .await?;
    // It runs after it was fixed.
    repository.push(&format!("oci:{folder}/oci:1")).await?;
    world.wait_phase("broken", "Succeeded", PULLED).await?;
    let log = world.logs("broken", "main").await?;
    ensure!(log == OWN, "{log}");
    world.on("login", ["rm", "-r", &folder]).ok().await?;
    repository.remove().await?;
    world.finish().await
}

#[tokio::test]
async fn a_name_that_is_none_waits_as_on_any_node() -> anyhow::Result<()> {
    let world = World::new("bad-name").await?;
    world
        .create(&PodBuilder::new("bad").image("Not/An/Image"))
        .await?;
    let message = waits_by(&world, "bad", "InvalidImageName").await?;
    let expected = "Failed to apply default image tag \"Not/An/Image\": couldn't parse image name \"Not/An/Image\": invalid \
                    reference format";
    ensure!(message.starts_with(expected), "{message}");
    told(&world, "bad", &[&format!("InspectFailed: {expected}")]).await?;
    told(&world, "bad", &["Failed: Error: InvalidImageName"]).await?;
    world.finish().await
}

/// The password of the registry on ctl:5001 for the user ann.
const PASSWORD: &str = "pull-s3cr3t-of-ann";

/// A pull secret in the form of `kubectl create secret docker-registry`.
async fn create_login(world: &World, name: &str, password: &str) -> anyhow::Result<()> {
    let password = format!("--docker-password={password}");
    let create = [
        "create",
        "secret",
        "docker-registry",
        name,
        "--docker-server=http://ctl:5001",
        "--docker-username=ann",
        &password,
    ];
    world.kubectl(create).ok().await?;
    Ok(())
}

/// Runs pods whose service account has the pull secret: admission copies it into them.
async fn run_with_the_secret_of_a_service_account(
    world: &World,
    pod: impl Fn(&str) -> PodBuilder,
) -> anyhow::Result<()> {
    let patch = r#"{"imagePullSecrets": [{"name": "login"}]}"#;
    world
        .kubectl(["create", "serviceaccount", "robot"])
        .ok()
        .await?;
    world
        .kubectl(["patch", "serviceaccount", "robot", "-p", patch])
        .ok()
        .await?;
    for policy in ["Never", "Always"] {
        let name = policy.to_lowercase();
        let robot = pod(&name).spec("serviceAccountName", json!("robot"));
        world
            .create(&robot.set("imagePullPolicy", json!(policy)))
            .await?;
        world.wait_phase(&name, "Succeeded", PULLED).await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_private_image_runs_for_those_who_have_its_password() -> anyhow::Result<()> {
    let world = World::new("private-image").await?;
    let repository = Repository::new(&world);
    let folder = repository.push_one_of_its_own().await?;
    let private = repository.image().replace("ctl:5000", "ctl:5001");
    let pod = |name: &str| as_it_is(PodBuilder::new(name), &private);
    let since = world.version().await?;
    let uid = world.create(&pod("nobody")).await?;
    let message = cannot_pull(&world, "nobody", &since).await?;
    ensure!(message.contains("user name and a password"), "{message}");
    // A wrong password; the pod goes on once the Secret is right.
    create_login(&world, "login", "wrong").await?;
    let secrets = json!([{"name": "login"}, {"name": "nonesuch"}]);
    world
        .create(&pod("own").spec("imagePullSecrets", secrets))
        .await?;
    let missing =
        "FailedToRetrieveImagePullSecret: Unable to retrieve some image pull secrets (nonesuch)";
    told(&world, "own", &[missing]).await?;
    told(
        &world,
        "own",
        &["Failed to pull image", "authentication required"],
    )
    .await?;
    world.kubectl(["delete", "secret", "login"]).ok().await?;
    create_login(&world, "login", PASSWORD).await?;
    let ended = world.wait_phase("own", "Succeeded", PULLED).await?;
    ensure!(world.logs("own", "main").await? == OWN);
    digest(&ended)?;
    run_with_the_secret_of_a_service_account(&world, &pod).await?;
    // The image is cached now, and still not for others.
    let stranger = pod("stranger").set("imagePullPolicy", json!("Never"));
    world.create(&stranger).await?;
    waits_by(&world, "stranger", "ErrImageNeverPull").await?;
    told(&world, "nobody", &["Back-off pulling image"]).await?;
    ensure!(world.jobs(&uid).await?.is_empty(), "it has a job");
    let leak = ["grep", "-rlF", PASSWORD, "/home/hpcuser/.local/state/knoc"];
    let found = world.on("login", leak).output().await?;
    ensure!(found.stdout.is_empty(), "{found:?}");
    world.on("login", ["rm", "-r", &folder]).ok().await?;
    repository.remove().await?;
    world.finish().await
}

/// How the files of a SIF file are compressed: the number in the superblock of its squashfs.
async fn compression(world: &World, sif: &str) -> anyhow::Result<String> {
    let script = format!(
        "start=$(apptainer sif list {sif} | awk -F'|' '/Squashfs/ {{ split($4, a, \"-\"); print a[1] + 0 }}') && \
         od -An -tu2 -j $((start + 20)) -N 2 {sif}"
    );
    let read = world.on("login", ["sh", "-c", &script]).ok().await?;
    Ok(read.text().trim().to_owned())
}

#[tokio::test]
async fn an_image_from_a_registry_is_compressed_with_zstd_and_the_nodes_mount_it()
-> anyhow::Result<()> {
    let world = World::new("zstd").await?;
    let repository = Repository::new(&world);
    let folder = repository.push_one_of_its_own().await?;
    let (log, digest) = pulled(&repository, "zstd", "IfNotPresent").await?;
    ensure!(log == OWN, "{log}");
    let file = digest.replace(':', "-");
    let sif = format!("/home/hpcuser/.local/state/knoc/images/{file}.sif");
    let is = compression(&world, &sif).await?;
    ensure!(is == "6", "{is} is not that of zstd");
    let events = world.events("zstd").await?;
    let unpacked = events.iter().any(|event| event.contains("ImageUnpacked"));
    ensure!(!unpacked, "{events:?}");
    world.on("login", ["rm", "-r", &folder]).ok().await?;
    repository.remove().await?;
    world.finish().await
}

/// The number of files that the image of many layers has, each in a layer of its own.
const LAYERS: usize = 20;

#[tokio::test]
async fn an_image_of_many_layers_in_another_compression_runs() -> anyhow::Result<()> {
    let world = World::new("many-layers").await?;
    let repository = Repository::new(&world);
    let folder = format!("/scratch/{}", world.namespace);
    let recipe = format!(
        "mkdir {folder} && cd {folder} && skopeo copy -q --insecure-policy oci:/images/own.oci:1 oci:oci:1 && \
         umoci config --image oci:1 --config.volume /data --config.volume /srv/own && \
         for i in $(seq {LAYERS}); do head -c 1048576 /dev/urandom >$i && umoci insert --image oci:1 $i /layers/$i || exit 1; done && \
         skopeo copy -q --insecure-policy --dest-tls-verify=false --dest-compress-format zstd oci:oci:1 docker://{} && \
         for i in $(seq {LAYERS}); do cat $i; done | sha256sum",
        repository.image()
    );
    let made = world.on("login", ["sh", "-c", &recipe]);
    let made = made.deadline(PULLED).ok().await?;
    let (made, sum) = (
        made.text(),
        format!("for i in $(seq {LAYERS}); do cat /layers/$i; done | sha256sum"),
    );
    let sum_of = made.lines().last().context("no sum")?.to_owned();
    // Volumes of the image are writable although the root is not; the pod's own come first.
    let script = format!(
        "{sum} && echo x >/data/file && cat /data/file && ! touch /srv/own/file 2>&1 && ! touch /file 2>&1"
    );
    let pod = PodBuilder::new("layers")
        .image(&repository.image())
        .sh(&script)
        .set("securityContext", json!({"readOnlyRootFilesystem": true}))
        .spec(
            "volumes",
            json!([{"name": "own", "configMap": {"name": "kube-root-ca.crt"}}]),
        )
        .set(
            "volumeMounts",
            json!([{"name": "own", "mountPath": "/srv/own"}]),
        );
    world.create(&pod).await?;
    world.wait_phase("layers", "Succeeded", PULLED).await?;
    let log = world.logs("layers", "main").await?;
    ensure!(
        log.starts_with(&sum_of) && log.contains("\nx\n"),
        "{log} of {made}"
    );
    told(
        &world,
        "layers",
        &["Pulled: Successfully pulled image", "Image size: "],
    )
    .await?;
    world.on("login", ["rm", "-r", &folder]).ok().await?;
    repository.remove().await?;
    world.finish().await
}

#[tokio::test]
async fn the_volumes_of_an_image_have_its_files_although_the_root_is_read_only()
-> anyhow::Result<()> {
    let world = World::new("image-files").await?;
    let repository = Repository::new(&world);
    let folder = repository.push_one_of_its_own().await?;
    let make = format!(
        "cd {folder} && mkdir -p data/deep data/mounted && echo text >data/deep/file && chmod 640 data/deep/file && \
         head -c 4194304 /dev/urandom >data/deep/large && chmod 750 data && ln -s deep/file data/link && \
         echo hidden >data/mounted/hidden && umoci insert --image oci:1 data /data && \
         umoci config --image oci:1 --config.volume /data --config.volume /none"
    );
    let make = world.on("login", ["sh", "-c", &make]);
    make.deadline(PULLED).ok().await?;
    repository.push(&format!("oci:{folder}/oci:1")).await?;
    // The first container changes its own copy.
    let script = "cat /data/link; stat -c %a /data/deep/file /data; echo more >>/data/link && cat /data/deep/file; ls /data/mounted; \
                  touch /data/new /none/new && echo written; touch /data/mounted/mine; touch /file 2>/dev/null || echo read-only";
    let context = json!({"readOnlyRootFilesystem": true});
    let pod = PodBuilder::new("files")
        .image(&repository.image())
        .set("securityContext", context.clone())
        .empty_dir("/data/mounted")
        .sh("sleep 600")
        .init_container("first")
        .image(&repository.image())
        .set("securityContext", context)
        .set(
            "volumeMounts",
            json!([{"name": "data", "mountPath": "/data/mounted"}]),
        )
        .sh(script);
    let uid = world.create(&pod).await?;
    world.wait_phase("files", "Running", PULLED).await?;
    let log = world.logs("files", "first").await?;
    ensure!(
        log == "text\n640\n750\ntext\nmore\nwritten\nread-only\n",
        "{log:?}"
    );
    let look = "cat /data/link; ls /data /data/mounted /none";
    let look = world.exec(&uid, "main", ["sh", "-c", look]).ok().await?;
    let wanted = "text\n/data:\ndeep\nlink\nmounted\n\n/data/mounted:\nmine\n\n/none:";
    ensure!(look.text().trim_end() == wanted, "{look}");
    world.delete("files", Some(0)).await?;
    copies_do_not_count(&world, &repository.image()).await?;
    world.on("login", ["rm", "-r", &folder]).ok().await?;
    repository.remove().await?;
    world.finish().await
}

/// Containers are measured in their order. What was copied into the volume of the first one is more than its limit, and still it is the
/// second one that has written too much.
async fn copies_do_not_count(world: &World, image: &str) -> anyhow::Result<()> {
    let limit = |storage: &str| {
        let limits = json!({"memory": "64Mi", "ephemeral-storage": storage});
        json!({"requests": {"cpu": "100m"}, "limits": limits})
    };
    let pod = PodBuilder::new("copies")
        .image(image)
        .set("securityContext", json!({"readOnlyRootFilesystem": true}))
        .set("resources", limit("2Mi"))
        .sh("exec sleep 600")
        .container("writes")
        .set("resources", limit("3Mi"))
        .sh("dd if=/dev/urandom of=/tmp/x bs=1M count=6; exec sleep 600")
        .container("modest")
        .set("resources", limit("64Mi"))
        .sh("exec sleep 600");
    world.create(&pod).await?;
    let ended = world.wait_phase("copies", "Failed", PULLED).await?;
    let (reason, message) = why(&ended);
    let expected = "Container writes exceeded its local ephemeral storage limit \"3Mi\".";
    ensure!(
        reason == "Evicted" && message.trim_end() == expected,
        "{reason}: {message:?}"
    );
    Ok(())
}

#[tokio::test]
async fn another_image_is_taken_by_a_running_pod_and_by_one_whose_image_does_not_exist()
-> anyhow::Result<()> {
    let world = World::new("images-update").await?;
    let set = async |pod: &str, image: &str| {
        let (pod, main) = (format!("pod/{pod}"), format!("main={image}"));
        world.kubectl(["set", "image", &*pod, &*main]).ok().await
    };
    let busybox = PodBuilder::image_name();
    // No entrypoint of an image runs for long, so the pods have a command.
    let wait = "trap 'exit 0' TERM; while :; do sleep 0.2; done";
    let runs = world.running(&PodBuilder::new("runs").sh(wait)).await?;
    world
        .create(&PodBuilder::new("wrong").image(&image("none:1")).sh(wait))
        .await?;
    let waits = |pod: &Pod| {
        let (reason, _) = container_reason(pod, "main")?;
        (reason == "ErrImagePull" || reason == "ImagePullBackOff").then_some(())
    };
    world
        .wait_for_state("wrong", "its image cannot be pulled", PULLED, waits)
        .await?;
    set("wrong", &busybox).await?;
    set("runs", &image("own:1")).await?;
    let has = |image: String, restarts: i32| {
        move |pod: &Pod| {
            let all = pod.status.as_ref()?.container_statuses.as_ref()?;
            let main = all.iter().find(|one| one.name == "main")?;
            let runs = main.state.as_ref()?.running.is_some();
            (runs && main.image == image && main.restart_count == restarts).then_some(())
        }
    };
    world
        .wait_for_state("wrong", "it runs", PULLED, has(busybox, 0))
        .await?;
    world
        .wait_for_state(
            "runs",
            "it runs with the other image",
            PULLED,
            has(image("own:1"), 1),
        )
        .await?;
    let inside = world.exec(&runs, "main", ["cat", "/bin/show"]).ok().await?;
    ensure!(!inside.stdout.is_empty(), "{inside:?}");
    world.finish().await
}
