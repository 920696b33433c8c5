//! Data of the site in pods of the real stack: host paths by the site's policy, claims of volumes that lie there, what the site
//! mounts into every container, and images below a root; ports of the node that lead to a pod; and containers that ask for privileges.
//!
//! The policy is changed while the suite runs; `sweep.sh` removes what an interrupted run leaves.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use knoc_tests::{
    PodBuilder, World, image, wait_for,
    world::{SOON, container_reason, phase_of, why},
};
use serde_json::{Value, json};

/// The time for a job to start and end beside those of other tests.
const RUN: Duration = Duration::from_mins(4);

const SITE_FILE: &str = "/home/hpcuser/.config/knoc/agent.toml";

/// Runs a script on the login node as the agent's user.
async fn on_login(world: &World, script: &str) -> anyhow::Result<String> {
    let ran = world.on("login", ["sh", "-ec", script]).ok().await?;
    Ok(String::from_utf8_lossy(&ran.stdout).into_owned())
}

/// The port of the node that may lead to a pod.
const HOST_PORT: u16 = 21_053;

/// The driver whose volumes the site has on a shared file system.
const CSI_DRIVER: &str = "shared.example.org";

/// Replaces what the policy says about volumes, host ports and privileges, and the site's own mounts. Restarts the agent, so that it holds at once.
async fn set_policy(world: &World, lines: &str, tables: &str) -> anyhow::Result<()> {
    let script = format!(
        "f={SITE_FILE}; sed -i '/^privileged *=/d; /^host_paths *=/d; /^nfs *=/d; /^csi *=/d; /^host_ports *=/d; /^# l3_data$/,$d' $f; cat >$f.lines <<'END'\n{lines}END\n\
         sed -i \"/^\\[policy\\]/r $f.lines\" $f; rm $f.lines; cat >>$f <<'END'\n{tables}END\n"
    );
    on_login(world, &script).await?;
    world.service("agent.sh", "down").ok().await?;
    world.service("agent.sh", "up").ok().await?;
    Ok(())
}

#[tokio::test]
async fn pods_have_the_data_of_the_site_as_its_policy_says() -> anyhow::Result<()> {
    let world = World::new("data").await?;
    let folder = format!("/scratch/{}", world.namespace);
    let policy = format!(
        "host_paths = [{{path = \"/images\"}}, {{path = \"{folder}\", writable = true}}]\n\
         nfs = [{{server = \"filer.example.org\", export = \"/export\", path = \"{folder}/nfs\"}}]\n\
         csi = [{{driver = \"{CSI_DRIVER}\", path = \"{folder}/csi/{{handle}}/{{share}}\"}}]\n\
         host_ports = [\"{HOST_PORT}\"]\n\
         privileged = \"unprivileged\"\n"
    );
    let tables = "# l3_data\n[[bind]]\npath = \"/images\"\ntarget = \"/opt/site\"\n\
                  [[bind]]\npath = \"/nowhere\"\npartitions = [\"none\"]\n\
                  [[bind]]\npath = \"/images\"\ntarget = \"/opt/short\"\npartitions = [\"short\"]\n";
    let prepare = format!(
        "mkdir -p {folder}/nfs/set {folder}/claim {folder}/csi/set/own; echo exported >{folder}/nfs/set/file; ln -s /home/hpcuser {folder}/out"
    );
    on_login(&world, &prepare).await?;
    image::build(&world, &folder).await?;
    set_policy(&world, &policy, tables).await?;
    let ran = tokio::join!(
        host_paths(&world, &folder),
        refusals(&world, &folder),
        claims(&world, &folder),
        csi_claim(&world, &folder),
        host_ports(&world, &folder),
        binds_of_partitions(&world),
        privileged(&world)
    );
    set_policy(&world, "", "").await?;
    on_login(&world, &format!("rm -rf {folder}")).await?;
    let (host_paths, refusals, claims, csi, host_ports, binds, privileged) = ran;
    privileged?;
    csi?;
    binds?;
    host_ports?;
    host_paths?;
    refusals?;
    claims?;
    world.finish().await
}

/// A pod in a network of its own with a port of the node for datagrams.
fn answering(name: &str, folder: &str, host_port: u16) -> PodBuilder {
    let port = json!([{"containerPort": 5353, "hostPort": host_port, "protocol": "UDP"}]);
    PodBuilder::new(name)
        .image(&image::path(folder))
        .annotation("knoc.io/network", "private")
        .set("ports", port)
        .command(["/knoc-dialer", "echo", "0.0.0.0:5353"])
}

async fn host_ports(world: &World, folder: &str) -> anyhow::Result<()> {
    let unlisted = answering("unlisted", folder, HOST_PORT + 1);
    world.create(&unlisted).await?;
    let failed = world.wait_phase("unlisted", "Failed", SOON).await?;
    let (_, told) = why(&failed);
    let expected = format!("hostPort {} is not among policy.host_ports", HOST_PORT + 1);
    ensure!(told.contains(&expected), "{told}");
    let uid = world
        .running(&answering("datagrams", folder, HOST_PORT))
        .await?;
    let node = world.compute_node(&uid).await?;
    let ask = format!(
        "exec 3<>/dev/udp/127.0.0.1/{HOST_PORT}; for word in one two; do echo $word >&3; timeout 2 head -n 1 <&3; done"
    );
    // Each try is a client of its own.
    wait_for("its datagrams come back", SOON, async || {
        let asked = world.on(&node, ["bash", "-c", &ask]).output().await?;
        ensure!(asked.text() == "one\ntwo", "{asked}");
        anyhow::Ok(())
    })
    .await
}

async fn host_paths(world: &World, folder: &str) -> anyhow::Result<()> {
    let pod = PodBuilder::new("paths")
        .annotation("knoc.io/image-root", "/images")
        .image("/busybox.sif")
        .spec(
            "volumes",
            json!([
                {"name": "new", "hostPath": {"path": format!("{folder}/new/er"), "type": "DirectoryOrCreate"}},
                {"name": "file", "hostPath": {"path": format!("{folder}/file"), "type": "FileOrCreate"}},
                {"name": "images", "hostPath": {"path": "/images/"}},
            ]),
        )
        .set("env", json!([{"name": "WHO", "value": "expanded"}]))
        .set(
            "volumeMounts",
            json!([
                {"name": "new", "mountPath": "/new"},
                {"name": "new", "mountPath": "/sub", "subPath": "a/b"},
                {"name": "new", "mountPath": "/expr", "subPathExpr": "$(WHO)"},
                {"name": "file", "mountPath": "/etc/own"},
                {"name": "images", "mountPath": "/images", "readOnly": true},
            ]),
        )
        .sh("echo 1 >/new/x; echo 2 >/sub/x; echo 3 >/expr/x; echo 4 >>/etc/own; \
             test -e /images/busybox.sif -a -e /opt/site/busybox.sif && echo site; \
             touch /images/x 2>/dev/null || touch /opt/site/x 2>/dev/null || echo read-only; stat -c %u /new/x")
        .set("securityContext", json!({"runAsUser": 4321}));
    world.create(&pod).await?;
    let ended = world.wait_phase("paths", "Succeeded", RUN).await;
    let log = world.logs("paths", "main").await;
    ended.with_context(|| format!("it printed {log:?}"))?;
    let log = log?;
    ensure!(log == "site\nread-only\n4321\n", "it printed {log:?}");
    let written = format!(
        "cd {folder}; cat new/er/x new/er/a/b/x new/er/expanded/x file; stat -c %U new/er/x"
    );
    let written = on_login(world, &written).await?;
    ensure!(written == "1\n2\n3\n4\nhpcuser\n", "{written:?}");
    Ok(())
}

/// All partitions have the first of the site's mounts, and one partition has another one too.
async fn binds_of_partitions(world: &World) -> anyhow::Result<()> {
    let look = "for d in site short; do test -e /opt/$d/busybox.sif && echo $d; done; echo done";
    for (partition, expected) in [("short", "site\nshort\ndone\n"), ("main", "site\ndone\n")] {
        let name = format!("bound-{partition}");
        let pod = PodBuilder::new(&name)
            .annotation("knoc.io/partition", partition)
            .sh(look);
        world.create(&pod).await?;
        world.wait_phase(&name, "Succeeded", RUN).await?;
        let log = world.logs(&name, "main").await?;
        ensure!(log == expected, "{partition}: it printed {log:?}");
    }
    Ok(())
}

/// A pod that mounts this host path.
fn mounting(name: &str, path: &str, kind: &str) -> PodBuilder {
    PodBuilder::new(name)
        .spec(
            "volumes",
            json!([{"name": "data", "hostPath": {"path": path, "type": kind}}]),
        )
        .set(
            "volumeMounts",
            json!([{"name": "data", "mountPath": "/data"}]),
        )
}

/// A container that asks for privileges runs without them, and an Event says so. The kubelet may learn after the agent's restart that this
/// site allows it, and rejects such pods until then.
async fn privileged(world: &World) -> anyhow::Result<()> {
    let script = "grep ^CapEff /proc/self/status | cut -f 2; mount -t tmpfs none /mnt 2>/dev/null || echo refused";
    let mut tries = 0;
    let name = wait_for("a pod that asks for privileges runs", RUN, async || {
        tries += 1;
        let name = format!("privileged{tries}");
        let pod = PodBuilder::new(&name)
            .set("securityContext", json!({"privileged": true}))
            .sh(script);
        world.run(&pod, "Succeeded").await.map(|_| name)
    })
    .await?;
    let log = world.logs(&name, "main").await?;
    ensure!(log == "0000000000000000\nrefused\n", "{log:?}");
    let mapped = "Mapped: spec.containers[main].securityContext.privileged: the container runs without privileges";
    wait_for("the Event of what was mapped", SOON, async || {
        let events = world.events(&name).await?;
        let told = events.iter().any(|event| event.starts_with(mapped));
        ensure!(told, "{events:?}");
        Ok(())
    })
    .await
}

async fn refusals(world: &World, folder: &str) -> anyhow::Result<()> {
    for (name, path, message) in [
        ("etc", "/etc", "\"/etc\" is not below"),
        ("images", "/images", "readOnly: true"),
    ] {
        world.create(&mounting(name, path, "")).await?;
        let failed = world.wait_phase(name, "Failed", SOON).await?;
        let (reason, told) = why(&failed);
        ensure!(
            reason == "UnsupportedPodSpec" && told.contains(message),
            "{reason}: {told}"
        );
    }
    for (name, path, kind, message) in [
        (
            "none",
            format!("{folder}/none"),
            "Directory",
            "doesn't exist",
        ),
        (
            "type",
            format!("{folder}/nfs"),
            "File",
            "hostPath type check failed",
        ),
        (
            "out",
            format!("{folder}/out"),
            "",
            "leads out of its folder",
        ),
        (
            "ssh",
            format!("{folder}/out/.ssh"),
            "",
            "leads out of its folder",
        ),
    ] {
        world.create(&mounting(name, &path, kind)).await?;
        let failed = world.wait_phase(name, "Failed", RUN).await?;
        let (reason, told) = container_reason(&failed, "main").context("no reason")?;
        ensure!(
            reason == "CreateContainerError" && told.contains(message),
            "{name}: {reason}: {told}"
        );
    }
    Ok(())
}

/// A volume and the claim that is bound to it.
fn volume(world: &World, name: &str, kind: &str, source: &Value) -> String {
    let full = format!("{}-{name}", world.namespace);
    let modes = json!(["ReadWriteMany"]);
    let volume = json!({
        "apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": full},
        "spec": {
            "capacity": {"storage": "1Gi"}, "accessModes": modes, "storageClassName": "", kind: source,
            "claimRef": {"namespace": world.namespace, "name": name},
        },
    });
    let claim = json!({
        "apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": name},
        "spec": {
            "accessModes": modes, "storageClassName": "", "volumeName": full,
            "resources": {"requests": {"storage": "1Gi"}},
        },
    });
    format!("{volume}\n---\n{claim}\n")
}

async fn claims(world: &World, folder: &str) -> anyhow::Result<()> {
    let host = json!({"path": format!("{folder}/claim")});
    let nfs = json!({"server": "filer.example.org", "path": "/export/set", "readOnly": true});
    let volumes = [
        volume(world, "host", "hostPath", &host),
        volume(world, "nfs", "nfs", &nfs),
    ];
    let apply = world.kubectl(["apply", "-f", "-"]);
    apply.stdin(volumes.join("---\n")).ok().await?;
    let pod = PodBuilder::new("claims")
        .spec(
            "volumes",
            json!([
                {"name": "host", "persistentVolumeClaim": {"claimName": "host"}},
                {"name": "nfs", "persistentVolumeClaim": {"claimName": "nfs"}},
            ]),
        )
        .set(
            "volumeMounts",
            json!([{"name": "host", "mountPath": "/host"}, {"name": "nfs", "mountPath": "/nfs"}]),
        )
        .sh(
            "cp /nfs/file /host/copy && cat /host/copy; touch /nfs/x 2>/dev/null || echo read-only",
        );
    let ran = async {
        world.create(&pod).await?;
        world.wait_phase("claims", "Succeeded", RUN).await?;
        let log = world.logs("claims", "main").await?;
        ensure!(log == "exported\nread-only\n", "it printed {log:?}");
        let copied = on_login(world, &format!("cat {folder}/claim/copy")).await?;
        ensure!(copied == "exported\n", "{copied:?}");
        let unbound = PodBuilder::new("unbound").spec(
            "volumes",
            json!([{"name": "data", "persistentVolumeClaim": {"claimName": "nowhere"}}]),
        );
        world.create(&unbound).await?;
        let told = world.wait_for_state("unbound", "the scheduler's message", SOON, |pod| {
            let conditions = pod
                .status
                .iter()
                .flat_map(|status| status.conditions.iter().flatten());
            let mut messages = conditions.filter_map(|condition| condition.message.as_deref());
            messages
                .any(|message| message.contains("nowhere"))
                .then_some(())
        });
        told.await?;
        let pod = world.pod("unbound").await?;
        ensure!(phase_of(&pod) == "Pending", "{pod:?}");
        anyhow::Ok(())
    };
    let ran = ran.await;
    for name in ["host", "nfs"] {
        let full = format!("{}-{name}", world.namespace);
        let delete = ["delete", "persistentvolume", &full, "--wait=false"];
        world.kubectl(delete).ok().await?;
    }
    ran
}

/// No driver runs anywhere: the folder of the volume is there already.
async fn csi_claim(world: &World, folder: &str) -> anyhow::Result<()> {
    let source = json!({
        "driver": CSI_DRIVER, "volumeHandle": "set", "volumeAttributes": {"share": "/own"},
    });
    let apply = world.kubectl(["apply", "-f", "-"]);
    let volume = volume(world, "csi", "csi", &source);
    apply.stdin(volume).ok().await?;
    let claim = json!([{"name": "data", "persistentVolumeClaim": {"claimName": "csi"}}]);
    let pod = PodBuilder::new("csi")
        .spec("volumes", claim)
        .set(
            "volumeMounts",
            json!([{"name": "data", "mountPath": "/data"}]),
        )
        .sh("echo written >/data/file");
    let ran = async {
        world.create(&pod).await?;
        world.wait_phase("csi", "Succeeded", RUN).await?;
        let written = on_login(world, &format!("cat {folder}/csi/set/own/file")).await?;
        ensure!(written == "written\n", "{written:?}");
        anyhow::Ok(())
    };
    let ran = ran.await;
    let full = format!("{}-csi", world.namespace);
    let delete = ["delete", "persistentvolume", &full, "--wait=false"];
    world.kubectl(delete).ok().await?;
    ran
}
