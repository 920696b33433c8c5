//! Attempts of containers and other users to escape from a pod: each replaces a file between our check and its use.

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use k8s_openapi::api::core::v1::{ConfigMap, Pod};
use knoc_tests::{
    PodBuilder, World, wait_for,
    world::{SOON, STATE, container_reason},
};
use kube::api::PostParams;
use serde_json::json;

/// How long the race lasts at least, and how long it may take on a busy machine until there was one: until the folder was
/// swapped and mounted often enough.
const RACE: Duration = Duration::from_mins(1);
const SLOW_RACE: Duration = Duration::from_mins(5);
const SWAPS: usize = 100;
const MOUNTS: usize = 10;

/// Containers that mount the swapped folder. Each restarts after a delay that doubles, so many containers give many starts.
const READERS: usize = 16;

/// The swapper: to the end of the race, `sub` is in turn a folder, a link to the account's home and a link to the root.
const SWAP: &str = r#"
mkdir -p /v/sub; echo inside >/v/sub/inside; ln -s "$ACCOUNT" /v/home; ln -s / /v/root
swaps=0
while [ ! -e /out/over ]; do
    for link in home root; do
        mv -T /v/sub /v/folder; mv -T /v/$link /v/sub
        mv -T /v/sub /v/$link; mv -T /v/folder /v/sub
        swaps=$((swaps + 1))
    done
    echo $swaps >/out/swaps.new; mv /out/swaps.new /out/swaps
done
sleep 600
"#;

/// A reader: it reports to the swapper's pod which of the account's files it can read, and where it can write.
const READ: &str = r#"
echo "$HOSTNAME" >>/out/starts
for at in "/s" "/s$ACCOUNT"; do
    [ -e /s/inside ] || [ ! -d "$at" ] || echo written >"$at/$CANARY.written" 2>/dev/null
    if grep -q secret "$at/$CANARY" 2>/dev/null; then echo "read $at" >>/out/escapes; break; fi
done
[ -e /s/inside ] && echo yes >>/out/inside
exit 0
"#;

/// Files of the account that a container must not reach.
struct Account<'a> {
    world: &'a World,
    home: String,
    canary: String,
}

impl<'a> Account<'a> {
    async fn new(world: &'a World) -> anyhow::Result<Self> {
        let canary = format!("canary-{}", world.namespace);
        let make = format!("echo secret >~/{canary}; chmod 600 ~/{canary}; cd; pwd");
        let home = world.on("login", ["sh", "-c", &make]).ok().await?;
        let home = home.text().trim().to_owned();
        Ok(Self {
            world,
            home,
            canary,
        })
    }

    /// Returns what was written next to the folder, and removes all of it.
    async fn finish(self) -> anyhow::Result<bool> {
        let Self { home, canary, .. } = &self;
        let look = format!(
            "ls {home}/{canary}.written 2>/dev/null; rm -f {home}/{canary} {home}/{canary}.written"
        );
        let found = self.world.on("login", ["sh", "-c", &look]).output().await?;
        Ok(!found.text().trim().is_empty())
    }
}

/// The pod whose containers race.
fn racers(account: &Account<'_>) -> PodBuilder {
    let env = json!([
        {"name": "ACCOUNT", "value": account.home},
        {"name": "CANARY", "value": account.canary},
    ]);
    let small = json!({"requests": {"cpu": "100m"}, "limits": {"memory": "48Mi"}});
    let out = json!({"name": "out", "mountPath": "/out"});
    let mut pod = PodBuilder::new("swap")
        .restart("Always")
        .spec(
            "volumes",
            json!([{"name": "v", "emptyDir": {}}, {"name": "out", "emptyDir": {}}]),
        )
        .sh(SWAP)
        .set("resources", small.clone())
        .set("env", env.clone())
        .set(
            "volumeMounts",
            json!([{"name": "v", "mountPath": "/v"}, out]),
        );
    for reader in 0..READERS {
        let sub = json!({"name": "v", "mountPath": "/s", "subPath": "sub"});
        pod = pod
            .container(&format!("reader-{reader}"))
            .sh(READ)
            .set("resources", small.clone())
            .set("env", env.clone())
            .set("volumeMounts", json!([sub, out]));
    }
    pod
}

/// One container repeatedly replaces a folder of a volume with links to the account's home and to the root, while others mount it by
/// subPath: the folder itself is always mounted.
#[tokio::test]
async fn a_folder_that_is_swapped_for_a_link_is_never_left() -> anyhow::Result<()> {
    let world = World::new("swap").await?;
    let account = Account::new(&world).await?;
    let uid = world.create(&racers(&account)).await?;
    world.wait_job(&uid).await?;
    let count = async |file: &str| -> anyhow::Result<usize> {
        let text = format!("cat /out/{file} 2>/dev/null || true");
        let text = world.exec(&uid, "main", ["sh", "-c", &text]).ok().await?;
        let text = text.text();
        Ok(match file {
            "swaps" => text.trim().parse().unwrap_or(0),
            _ => text.lines().count(),
        })
    };
    let began = Instant::now();
    wait_for("the end of the race", SLOW_RACE, async || {
        let (swaps, inside) = (count("swaps").await?, count("inside").await?);
        let took = began.elapsed();
        let raced = swaps >= SWAPS && inside >= MOUNTS && took >= RACE;
        ensure!(raced, "{swaps} swaps, {inside} mounts after {took:?}");
        Ok(())
    })
    .await?;
    world
        .exec(&uid, "main", ["touch", "/out/over"])
        .ok()
        .await?;
    let (swaps, starts) = (count("swaps").await?, count("starts").await?);
    let (inside, escapes) = (count("inside").await?, count("escapes").await?);
    let written = account.finish().await?;
    println!("{swaps} swaps, {starts} starts, {inside} of them inside, {escapes} escapes");
    ensure!(
        escapes == 0,
        "{escapes} of {starts} starts read the account's files"
    );
    ensure!(!written, "a container wrote to the account's home");
    world.finish().await
}

/// Links that stay inside their volume are followed as in a kubelet, both those of the atomic writer and those of containers.
#[tokio::test]
async fn links_that_stay_in_their_volume_are_followed() -> anyhow::Result<()> {
    let world = World::new("sub-links").await?;
    let map = json!({
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "map"},
        "data": {"key": "value of the key"},
    });
    let map: ConfigMap = serde_json::from_value(map)?;
    world
        .api::<ConfigMap>()
        .create(&PostParams::default(), &map)
        .await?;
    let pod = PodBuilder::new("links")
        .spec(
            "volumes",
            json!([{"name": "v", "emptyDir": {}}, {"name": "map", "configMap": {"name": "map"}}]),
        )
        .spec("terminationGracePeriodSeconds", json!(1))
        .init_container("make")
        .sh("mkdir -p /v/real/deep; echo deep >/v/real/deep/file; ln -s real/deep /v/link; ln -s ../out /v/out")
        .set("volumeMounts", json!([{"name": "v", "mountPath": "/v"}]));
    let pod = pod
        .container("reads")
        .sh("cat /key /deep/file; echo here >/deep/message; echo x >>/key")
        .set("terminationMessagePath", json!("/deep/message"))
        .set(
            "volumeMounts",
            json!([
                {"name": "map", "mountPath": "/key", "subPath": "key"},
                {"name": "v", "mountPath": "/deep", "subPath": "link"},
            ]),
        )
        .container("leaves")
        .set(
            "volumeMounts",
            json!([{"name": "v", "mountPath": "/v", "subPath": "out"}]),
        );
    world.create(&pod).await?;
    let ended = world.wait_phase("links", "Failed", SOON).await?;
    let log = world.logs("links", "reads").await?;
    ensure!(log.starts_with("value of the keydeep\n"), "{log:?}");
    ensure!(log.contains("Read-only file system"), "{log:?}");
    let reason =
        |name| container_reason(&ended, name).with_context(|| format!("{name} has no end"));
    ensure!(reason("reads")?.1 == "here\n", "{:?}", reason("reads")?);
    let (why, message) = reason("leaves")?;
    ensure!(
        why == "CreateContainerError" && message.contains("\"out\""),
        "{why}: {message}"
    );
    world.finish().await
}

/// An image file is replaced while its pod runs: the pod's next start does not use the new file.
#[tokio::test]
async fn an_image_that_is_replaced_is_not_started() -> anyhow::Result<()> {
    let world = World::new("image-swap").await?;
    let folder = format!("/scratch/{}", world.namespace);
    let image = format!("{folder}/image.sif");
    let sh = async |script: String| world.on("login", ["sh", "-c", &script]).ok().await;
    sh(format!(
        "mkdir -m 755 {folder} && cp /images/busybox.sif {image}"
    ))
    .await?;
    let restarts = PodBuilder::new("restarts")
        .restart("Always")
        .image(&image)
        .sh("while [ ! -e /go/on ]; do sleep 0.1; done; rm /go/on")
        .spec("volumes", json!([{"name": "go", "emptyDir": {}}]))
        .set("volumeMounts", json!([{"name": "go", "mountPath": "/go"}]));
    let uid = world.running(&restarts).await?;
    // The program ends as soon as it sees the file, and a command that has not ended by then is killed with it.
    let go_on = "(sleep 5; touch /go/on) >/dev/null 2>&1 &";
    // Unchanged, it starts again.
    world.exec(&uid, "main", ["sh", "-c", go_on]).ok().await?;
    world
        .wait_for_state("restarts", "started again", SOON, |pod| {
            let status = pod.status.as_ref()?.container_statuses.as_ref()?.first()?;
            (status.restart_count == 1 && status.ready).then_some(())
        })
        .await?;
    sh(format!(
        "mv {image} {folder}/old; ln -s /images/own.sif {image}"
    ))
    .await?;
    world.exec(&uid, "main", ["sh", "-c", go_on]).ok().await?;
    let message = world
        .wait_for_state("restarts", "refused", SOON, |pod| {
            let (_, message) = last_reason(pod)?;
            message.contains("replaced or changed").then_some(message)
        })
        .await?;
    ensure!(message.contains(&image), "{message}");
    world.delete("restarts", Some(0)).await?;

    // A folder that others can write is rejected at once, with its name.
    sh(format!(
        "rm {image}; mv {folder}/old {image}; chmod 777 {folder}"
    ))
    .await?;
    world
        .create(&PodBuilder::new("shared").image(&image))
        .await?;
    let message = world
        .wait_for_state("shared", "refused", SOON, |pod| {
            let (_, message) = container_reason(pod, "main")?;
            message.contains("trust_shared_roots").then_some(message)
        })
        .await?;
    ensure!(message.contains(&format!("{folder:?}")), "{message}");
    // Once it is private, the pod continues by itself.
    sh(format!("chmod 755 {folder}")).await?;
    world.wait_phase("shared", "Succeeded", SOON + SOON).await?;
    sh(format!("rm -r {folder}")).await?;
    world.finish().await
}

/// What root of a user namespace inside the container tries with our launcher, and with a copy of it in a volume. Each attempt
/// reports `NAME: done` or its error. The copy shows that this root can do all of that with a file that is not protected.
const ROOT: &str = r#"
cp /.knoc/agent /v/copy
cat >/v/attack <<'END'
attempt() { name=$1; shift; if error=$("$@" 2>&1); then echo "$name: done"; else echo "$name: $error"; fi; }
echo "uid: $(id -u)"
attempt namespace mount -t tmpfs none /tmp
for file in /v/copy /.knoc/agent; do
    attempt "chmod $file" chmod 777 $file
    attempt "remount $file" mount -o remount,bind,rw none $file
    attempt "unmount $file" umount $file
    attempt "truncate $file" sh -c ": >$file"
    attempt "remove $file" rm -f $file
done
END
exec unshare -U -r -m sh /v/attack
"#;

/// A container can make itself root of a user namespace of its own, with all capabilities in it. The launcher in the
/// container is the agent's own executable, which the account owns, and it stays read-only for that root too.
#[tokio::test]
async fn root_of_a_user_namespace_cannot_change_the_launcher() -> anyhow::Result<()> {
    let world = World::new("user-namespace").await?;
    let sums = async || {
        let sum = format!("sha256sum {STATE}/versions/*/knoc-agent");
        let run = world.on("login", ["sh", "-c", &sum]).ok().await?;
        Ok::<_, anyhow::Error>(run.text())
    };
    let before = sums().await?;
    let pod = PodBuilder::new("root")
        .spec("volumes", json!([{"name": "v", "emptyDir": {}}]))
        .sh(ROOT)
        .set("volumeMounts", json!([{"name": "v", "mountPath": "/v"}]));
    world.run(&pod, "Succeeded").await?;
    let log = world.logs("root", "main").await?;
    let outcome = |attempt: &str| {
        let of = log.lines().find_map(|line| line.strip_prefix(attempt));
        of.and_then(|rest| rest.strip_prefix(": "))
            .with_context(|| format!("{attempt} is not in {log:?}"))
    };
    ensure!(outcome("uid")? == "0", "{log}");
    ensure!(outcome("namespace")? == "done", "{log}");
    for attempt in ["chmod", "truncate", "remove"] {
        ensure!(outcome(&format!("{attempt} /v/copy"))? == "done", "{log}");
    }
    for attempt in ["chmod", "remount", "unmount", "truncate", "remove"] {
        let outcome = outcome(&format!("{attempt} /.knoc/agent"))?;
        ensure!(outcome != "done", "{attempt}: {log}");
    }
    for attempt in ["chmod", "truncate"] {
        let outcome = outcome(&format!("{attempt} /.knoc/agent"))?;
        ensure!(
            outcome.contains("Read-only file system"),
            "{attempt}: {log}"
        );
    }
    let after = sums().await?;
    ensure!(before == after, "before: {before}; after: {after}");
    world.finish().await
}

/// How the container ended last, even while it waits for its next start.
fn last_reason(pod: &Pod) -> Option<(String, String)> {
    let status = pod.status.as_ref()?.container_statuses.as_ref()?.first()?;
    let ended = [&status.state, &status.last_state]
        .into_iter()
        .find_map(|state| state.as_ref()?.terminated.clone())?;
    Some((
        ended.reason.unwrap_or_default(),
        ended.message.unwrap_or_default(),
    ))
}
