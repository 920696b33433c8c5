//! Users and groups that pods ask for, on the real stack: as whom programs see themselves, and whose files they make.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use k8s_openapi::api::core::v1::Pod;
use knoc_tests::{
    PodBuilder, World,
    repository::{Repository, image},
    world::{SOON, container_reason},
};
use serde_json::{Value, json};

/// The time for a conversion by Apptainer, after those of other tests.
const PULLED: Duration = Duration::from_mins(5);

/// The HPC user of the test bed.
const HPC_USER: &str = "2001";

/// As whom a program sees itself, and all rights that it has or could get, which are none.
const WHO: &str =
    "id -u; id -g; grep -E '^Cap(Prm|Eff|Bnd|Amb)' /proc/self/status | cut -f 2 | sort -u";

/// What [`WHO`] prints.
fn who(uid: &str, gid: &str) -> String {
    format!("{uid}\n{gid}\n0000000000000000\n")
}

/// The user of a container as its status has it.
fn user_of(pod: &Pod, container: &str) -> anyhow::Result<Value> {
    let status = serde_json::to_value(&pod.status)?;
    let all = status["containerStatuses"].as_array();
    let one = all.and_then(|all| all.iter().find(|one| one["name"] == container));
    Ok(one.context("no status")?["user"]["linux"].clone())
}

/// The image with accounts of its own, for the user that the tag selects.
fn places(tag: &str) -> String {
    PodBuilder::image_name().replace("busybox:latest", &format!("places:{tag}"))
}

#[tokio::test]
async fn a_program_sees_itself_as_the_user_that_the_pod_or_the_image_asks_for() -> anyhow::Result<()>
{
    let world = World::new("users").await?;
    let context = |pod: PodBuilder, context: Value| pod.set("securityContext", context).sh(WHO);
    let pod = context(PodBuilder::new("users"), json!({"runAsUser": 65534}));
    let pod = context(pod.container("root"), json!({"runAsUser": 0}));
    let forbidden = json!({"runAsUser": 1000, "runAsNonRoot": true});
    let pod = context(pod.container("non-root"), forbidden);
    let both = json!({"runAsUser": 1001, "runAsGroup": 2002});
    let pod = context(pod.container("both"), both);
    let pod = pod.container("unknown").image(&places("unknown")).sh(WHO);
    let pod = pod.container("with-group").image(&places("1")).sh(WHO);
    let pod = pod.container("name").image(&places("name")).sh(WHO);
    let pod = pod.container("of-passwd").image(&places("root"));
    let pod = context(pod, json!({"runAsUser": 1000}));
    world.create(&pod).await?;
    let ended = world.wait_phase("users", "Succeeded", PULLED).await?;
    for (container, uid, gid) in [
        ("main", "65534", "0"),
        ("root", "0", "0"),
        ("non-root", "1000", "0"),
        ("both", "1001", "2002"),
        ("unknown", "4321", "0"),
        ("with-group", "1000", "100"),
        // The number and the group in the image's line of the user.
        ("name", "1000", "100"),
        ("of-passwd", "1000", "100"),
    ] {
        let log = world.logs("users", container).await?;
        ensure!(log == who(uid, gid), "{container}: {log}");
        let shown = user_of(&ended, container)?;
        let (uid, gid) = (uid.parse::<i64>()?, gid.parse::<i64>()?);
        let wanted = json!({"uid": uid, "gid": gid, "supplementalGroups": [gid]});
        ensure!(shown == wanted, "{container}: {shown}");
    }
    let events = world.events("users").await?;
    let mapped = events.iter().any(|event| event.starts_with("Mapped"));
    ensure!(!mapped, "{events:?}");
    world.finish().await
}

#[tokio::test]
async fn an_image_that_names_root_runs_as_the_hpc_user() -> anyhow::Result<()> {
    let world = World::new("own-user").await?;
    let pod = PodBuilder::new("own").sh("id -u");
    let pod = pod.container("root").image(&places("root")).sh("id -u");
    world.create(&pod).await?;
    world.wait_phase("own", "Succeeded", PULLED).await?;
    for container in ["main", "root"] {
        let log = world.logs("own", container).await?;
        ensure!(log.trim() == HPC_USER, "{container}: {log}");
    }
    world.finish().await
}

/// Pushes an image for each user, which is its tag with `.` in place of `:`, to the test's own repository. They have the accounts of
/// the image `places`, and groups of their own. Returns the folder on the login node in which they were made.
async fn push_for_users(world: &World, users: &[&str]) -> anyhow::Result<String> {
    let folder = format!("/scratch/{}", world.namespace);
    let mut recipe = format!(
        "mkdir {folder} && cd {folder} && skopeo copy -q --insecure-policy oci:/images/places.oci:name oci:oci:base && \
         printf '%s\\n' root:x:0: staff:x:5005:jovyan >group && umoci insert --image oci:base group /etc/group"
    );
    for user in users {
        let tag = user.replace(':', ".");
        let target = of_user(world, user);
        let push = format!(
            " && umoci config --image oci:base --tag {tag} --config.user {user} && \
             skopeo copy -q --insecure-policy --dest-tls-verify=false oci:oci:{tag} docker://{target}"
        );
        recipe.push_str(&push);
    }
    let make = world.on("login", ["sh", "-c", &recipe]);
    make.deadline(PULLED).ok().await?;
    Ok(folder)
}

/// The image that was pushed for that user.
fn of_user(world: &World, user: &str) -> String {
    image(&format!("{}:{}", world.namespace, user.replace(':', ".")))
}

/// The container of a pod with the image for that user, which prints as whom it sees itself.
fn as_user(world: &World, pod: PodBuilder, user: &str) -> PodBuilder {
    pod.image(&of_user(world, user)).sh(WHO)
}

async fn names_that_the_image_lacks(world: &World) -> anyhow::Result<()> {
    for (name, user, what) in [
        ("no-user", "ghost", "user \"ghost\""),
        ("no-group", "jovyan:ghosts", "group \"ghosts\""),
    ] {
        let pod = as_user(world, PodBuilder::new(name), user);
        world.create(&pod).await?;
        let failed = world.wait_phase(name, "Failed", PULLED).await?;
        let (reason, message) = container_reason(&failed, "main").context("no reason")?;
        let image = of_user(world, user);
        let wanted = format!("unable to find {what} of the image {image:?}: no matching entries");
        ensure!(
            reason == "CreateContainerError" && message.contains(&wanted),
            "{reason}: {message}"
        );
    }
    Ok(())
}

async fn a_name_may_be_roots(world: &World) -> anyhow::Result<()> {
    let pod = as_user(world, PodBuilder::new("non-root"), "jovyan:staff");
    let pod = pod.set("securityContext", json!({"runAsNonRoot": true}));
    world.create(&pod).await?;
    let waits = |pod: &Pod| {
        let (reason, message) = container_reason(pod, "main")?;
        let said = message.contains("image has non-numeric user (jovyan), cannot verify");
        (reason == "CreateContainerConfigError" && said).then_some(())
    };
    let what = "nobody knows whether it is root";
    world.wait_for_state("non-root", what, PULLED, waits).await
}

#[tokio::test]
async fn a_group_that_the_image_names_has_its_number_and_an_unknown_name_is_an_error()
-> anyhow::Result<()> {
    let world = World::new("accounts").await?;
    let users = [
        "jovyan:staff",
        "jovyan:7",
        "4321:staff",
        "ghost",
        "jovyan:ghosts",
    ];
    let folder = push_for_users(&world, &users).await?;
    let pod = as_user(&world, PodBuilder::new("known"), "jovyan:staff");
    let pod = as_user(&world, pod.container("number"), "jovyan:7");
    let pod = as_user(&world, pod.container("no-name"), "4321:staff");
    // The pod's own ids come first, so names of the image do not matter.
    let pod = as_user(&world, pod.container("override"), "ghost");
    let context = json!({"runAsUser": 1000, "runAsGroup": 2002});
    let pod = pod.set("securityContext", context);
    world.create(&pod).await?;
    world.wait_phase("known", "Succeeded", PULLED).await?;
    for (container, uid, gid) in [
        ("main", "1000", "5005"),
        ("number", "1000", "7"),
        ("no-name", "4321", "5005"),
        ("override", "1000", "2002"),
    ] {
        let log = world.logs("known", container).await?;
        ensure!(log == who(uid, gid), "{container}: {log}");
    }
    names_that_the_image_lacks(&world).await?;
    a_name_may_be_roots(&world).await?;
    world.on("login", ["rm", "-r", &folder]).ok().await?;
    Repository::new(&world).remove().await?;
    world.finish().await
}

/// A file that would change the user of whoever executes it.
const SET_UID: &str = "cp /bin/busybox /tmp/busybox && chmod 4755 /tmp/busybox && /tmp/busybox id; \
     cat /proc/self/status | grep NoNewPrivs";

#[tokio::test]
async fn a_set_uid_program_and_a_command_of_exec_have_the_same_user() -> anyhow::Result<()> {
    let world = World::new("same-user").await?;
    let context = json!({"runAsUser": 1000, "allowPrivilegeEscalation": false});
    let pod = PodBuilder::new("same").set("securityContext", context);
    let pod = pod.sh(&format!("{SET_UID}; echo ready; sleep 600"));
    let uid = world.running(&pod).await?;
    world.wait_log("same", "main", "ready").await?;
    let log = world.logs("same", "main").await?;
    ensure!(log.starts_with("uid=1000"), "{log}");
    ensure!(
        !log.contains("euid") && log.contains("NoNewPrivs:\t1"),
        "{log}"
    );
    let exec = world.exec(&uid, "main", ["sh", "-c", WHO]).ok().await?;
    ensure!(exec.text() == who("1000", "0").trim_end(), "{exec}");
    // The program is the command's, too: its memory and files are open to it.
    let look = "test $(readlink /proc/1/ns/user) = $(readlink /proc/self/ns/user) && echo same; ls /proc/1/fd >/dev/null && echo open";
    let exec = world.exec(&uid, "main", ["sh", "-c", look]).ok().await?;
    ensure!(exec.text() == "same\nopen", "{exec}");
    world.delete("same", Some(0)).await?;
    world.finish().await
}

#[tokio::test]
async fn files_belong_to_the_user_inside_and_to_the_hpc_user_outside() -> anyhow::Result<()> {
    let world = World::new("files-of-users").await?;
    let name = &world.namespace;
    let mount = json!([{"name": "data", "mountPath": "/data"}]);
    let pod = PodBuilder::new("files")
        .spec("securityContext", json!({"runAsUser": 1234, "runAsGroup": 5678}))
        .sh(&format!("stat -c %u:%g /data/{name}; echo more >>/data/{name} && echo written; sleep 600"))
        .empty_dir("/data")
        .init_container("writer")
        .sh(&format!("echo text >/data/{name}; chown 1234:5678 /data/{name} && echo kept; chown 4:4 /data/{name} 2>/dev/null || echo refused"))
        .set("volumeMounts", mount);
    let uid = world.running(&pod).await?;
    world.wait_log("files", "main", "written").await?;
    let log = world.logs("files", "writer").await?;
    ensure!(log == "kept\nrefused\n", "{log}");
    let log = world.logs("files", "main").await?;
    ensure!(log == "1234:5678\nwritten\n", "{log}");
    let node = world.compute_node(&uid).await?;
    let find = format!("stat -c %U $(find /tmp/knoc-shim-* -name {name} -type f 2>/dev/null)");
    let owner = world.on(&node, ["sh", "-c", &find]).ok().await?.text();
    ensure!(owner == "hpcuser", "{owner}");
    world.delete("files", Some(0)).await?;
    world.wait_gone("files", SOON).await.context("it is gone")?;
    world.finish().await
}
