//! Files on the real stack: paths of volumes in all spellings, mounts at all paths of a container, files of an image in folders that
//! runtimes override, and the home of its user.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use knoc_tests::{
    PodBuilder, World,
    world::{SOON, container_reason, has_condition, why},
};
use serde_json::{Value, json};

/// The time for a conversion by Apptainer, after those of other tests.
const PULLED: Duration = Duration::from_mins(5);

/// The image with its own files, links and accounts, for the user that the tag selects.
fn places(tag: &str) -> String {
    PodBuilder::image_name().replace("busybox:latest", &format!("places:{tag}"))
}

/// Runs the pod to its end; returns the log of its container `main`.
async fn log_of(world: &World, pod: &PodBuilder) -> anyhow::Result<String> {
    world.create(pod).await?;
    let name = pod.name();
    let ended = world.wait_phase(name, "Succeeded", PULLED).await;
    let log = world.logs(name, "main").await;
    ended.with_context(|| format!("{name} printed {log:?}"))?;
    log
}

fn same(what: &str, is: &str, wanted: &str) -> anyhow::Result<()> {
    ensure!(is == wanted, "{what}:\n{is}instead of\n{wanted}");
    Ok(())
}

async fn config_map(world: &World, name: &str, literals: &[&str]) -> anyhow::Result<()> {
    let mut create = vec!["create".to_owned(), "configmap".to_owned(), name.to_owned()];
    create.extend(literals.iter().map(|one| format!("--from-literal={one}")));
    world.kubectl(create).ok().await?;
    Ok(())
}

#[tokio::test]
async fn one_key_at_several_paths_is_as_many_files() -> anyhow::Result<()> {
    let world = World::new("one-key").await?;
    let create = ["create", "secret", "generic", "ssh"];
    let keys = [
        "--from-literal=private=PRIVATE",
        "--from-literal=public=PUBLIC",
    ];
    world.kubectl(create.into_iter().chain(keys)).ok().await?;
    config_map(&world, "one", &["k=one"]).await?;
    config_map(&world, "two", &["k=two"]).await?;
    let twice = json!([{"key": "k", "path": "a"}, {"key": "k", "path": "d/b"}]);
    let pod = PodBuilder::new("keys")
        .spec(
            "volumes",
            json!([
                {"name": "ssh", "secret": {"secretName": "ssh", "defaultMode": 256, "items": [
                    {"key": "private", "path": "id_rsa"},
                    {"key": "public", "path": "id_rsa.pub"},
                    {"key": "public", "path": "authorized_keys"},
                ]}},
                {"name": "map", "configMap": {"name": "one", "items": twice}},
                {"name": "both", "projected": {"sources": [
                    {"configMap": {"name": "one", "items": twice}},
                    {"configMap": {"name": "two", "items": [{"key": "k", "path": "c"}, {"key": "k", "path": "d/e"}]}},
                ]}},
            ]),
        )
        .set(
            "volumeMounts",
            json!([
                {"name": "ssh", "mountPath": "/root/.ssh"},
                {"name": "map", "mountPath": "/map"},
                {"name": "both", "mountPath": "/both"},
            ]),
        )
        .sh("cd /root/.ssh && echo $(cat id_rsa) $(cat id_rsa.pub) $(cat authorized_keys) $(stat -L -c %a authorized_keys); \
             cd /map && echo $(cat a) $(cat d/b); cd /both && echo $(cat a) $(cat d/b) $(cat c) $(cat d/e)");
    let log = log_of(&world, &pod).await?;
    let wanted = "PRIVATE PUBLIC PUBLIC 400\none one\none one two two\n";
    same("the files", &log, wanted)?;
    world.finish().await
}

#[tokio::test]
async fn paths_that_are_not_normalized_lead_to_the_same_files() -> anyhow::Result<()> {
    let world = World::new("untidy").await?;
    config_map(&world, "map", &["k=value"]).await?;
    let write = "mkdir -p history logs a/b ..foo a..b; for d in history logs a/b ..foo a..b; do echo in $d >$d/file; done";
    let mounts = [
        ("/history", "./history"),
        ("/logs/", "logs/"),
        ("//ab", "a//b"),
        ("/ab2/.", "./a/./b/"),
        ("/foo", "..foo"),
        ("relative", "a..b"),
        ("/whole", "./"),
    ];
    let of_data = mounts
        .map(|(place, sub_path)| json!({"name": "data", "mountPath": place, "subPath": sub_path}));
    let mut all = of_data.to_vec();
    all.extend([
        json!({"name": "files", "mountPath": "/files"}),
        json!({"name": "files", "mountPath": "/one.txt", "subPath": "./conf//a.txt"}),
        json!({"name": "fresh", "mountPath": "/fresh", "subPath": "new//folder/"}),
    ]);
    let pod = PodBuilder::new("untidy")
        .spec(
            "volumes",
            json!([
                {"name": "data", "emptyDir": {}},
                {"name": "fresh", "emptyDir": {}},
                {"name": "files", "projected": {"sources": [
                    {"configMap": {"name": "map", "items": [
                        {"key": "k", "path": "./conf/a.txt"}, {"key": "k", "path": "d//e"}, {"key": "k", "path": "x..y/"},
                    ]}},
                    {"downwardAPI": {"items": [{"path": "./p//name", "fieldRef": {"fieldPath": "metadata.name"}}]}},
                ]}},
            ]),
        )
        .set("volumeMounts", json!(all))
        .set("workingDir", json!("/history//./"))
        .sh("cat file /logs/file /ab/file /ab2/file /foo/file /relative/file /whole/..foo/file; cd /files; \
             for f in conf/a.txt d/e x..y p/name /one.txt; do echo $(cat $f); done; touch /fresh/f && pwd")
        .init_container("write")
        .set("workingDir", json!("/data"))
        .set("volumeMounts", json!([{"name": "data", "mountPath": "/data"}]))
        .sh(write);
    let log = log_of(&world, &pod).await?;
    let wanted = "in history\nin logs\nin a/b\nin a/b\nin ..foo\nin a..b\nin ..foo\n\
                  value\nvalue\nvalue\nuntidy\nvalue\n/files\n";
    same("the files", &log, wanted)?;
    world.finish().await
}

#[tokio::test]
async fn variables_come_from_a_file_that_another_container_wrote() -> anyhow::Result<()> {
    let world = World::new("env-files").await?;
    let key = |key: &str, optional: bool| {
        json!({"name": key, "valueFrom": {"fileKeyRef":
            {"volumeName": "v", "path": "config.env", "key": key, "optional": optional}}})
    };
    let pod = |name: &str, env: serde_json::Value| {
        PodBuilder::new(name)
            .spec("volumes", json!([{"name": "v", "emptyDir": {}}]))
            .set("env", env)
            .sh("echo \"$ADDRESS/${NONE-unset}/$B\"")
            .init_container("write")
            .set("volumeMounts", json!([{"name": "v", "mountPath": "/data"}]))
            .sh("echo \"ADDRESS='from a file'\" > /data/config.env")
    };
    let after = json!({"name": "B", "value": "$(ADDRESS)"});
    let all = json!([key("ADDRESS", false), key("NONE", true), after]);
    let log = log_of(&world, &pod("reads", all)).await?;
    same("the variables", &log, "from a file/unset/from a file\n")?;
    let lacks = pod("lacks", json!([key("NONE", false)]))
        .container("late")
        .set("volumeMounts", json!([{"name": "v", "mountPath": "/data"}]))
        .sh("echo looks; until grep -q NONE /data/config.env; do sleep 0.2; done");
    let uid = world.create(&lacks).await?;
    let waits = |pod: &_| {
        let (reason, told) = container_reason(pod, "main")?;
        let lacks = told.contains("key \"NONE\" not found");
        (reason == "CreateContainerConfigError" && lacks).then_some(())
    };
    world
        .wait_for_state("lacks", "waits for the key", PULLED, waits)
        .await?;
    world.wait_log("lacks", "late", "looks").await?;
    let write = "echo \"NONE='late'\" >>/data/config.env";
    // It lets the container end.
    let write = world.exec(&uid, "late", ["sh", "-c", write]);
    write.ok_or_killed().await?;
    // Its restart policy is Never, but it was not started before.
    world.wait_phase("lacks", "Succeeded", PULLED).await?;
    let log = world.logs("lacks", "main").await?;
    same("the variable that came late", &log, "/late/\n")?;
    world.finish().await
}

#[tokio::test]
async fn a_volume_in_memory_has_its_size_and_all_containers_see_it() -> anyhow::Result<()> {
    let world = World::new("memory").await?;
    let mount = || json!([{"name": "m", "mountPath": "/m"}]);
    let key = json!({"volumeName": "m", "path": "config.env", "key": "WORD"});
    let pod = PodBuilder::new("full")
        .annotation("knoc.io/network", "private")
        .spec(
            "volumes",
            json!([{"name": "m", "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}}]),
        )
        .set("volumeMounts", mount())
        .set("env", json!([{"name": "WORD", "valueFrom": {"fileKeyRef": key}}]))
        .sh("echo $WORD; df -k /m | tail -1 | awk '{print $2}'; \
             dd if=/dev/zero of=/m/zero bs=1M count=2 2>&1 | grep -o 'No space left'; rm /m/zero; touch /m/more && echo room")
        .init_container("write")
        .set("volumeMounts", mount())
        .sh("echo \"WORD='written'\" > /m/config.env");
    let log = log_of(&world, &pod).await?;
    same("the volume", &log, "written\n1024\nNo space left\nroom\n")?;
    world.finish().await
}

#[tokio::test]
async fn a_volume_on_disk_that_exceeds_its_size_has_its_pod_evicted() -> anyhow::Result<()> {
    let world = World::new("evicted").await?;
    let pod = PodBuilder::new("greedy")
        .spec(
            "volumes",
            json!([
                {"name": "roomy", "emptyDir": {"sizeLimit": "64Mi"}},
                {"name": "tight", "emptyDir": {"sizeLimit": "1Mi"}},
            ]),
        )
        .set(
            "volumeMounts",
            json!([{"name": "roomy", "mountPath": "/roomy"}, {"name": "tight", "mountPath": "/tight"}]),
        )
        .sh("for v in roomy tight; do dd if=/dev/urandom of=/$v/x bs=1M count=2; done; exec sleep 600");
    world.create(&pod).await?;
    let ended = world.wait_phase("greedy", "Failed", PULLED).await?;
    let (reason, message) = why(&ended);
    let expected = "Usage of EmptyDir volume \"tight\" exceeds the limit \"1Mi\".";
    ensure!(
        reason == "Evicted" && message.trim_end() == expected,
        "{reason}: {message:?}"
    );
    // As in Kubernetes: the next pod of a Job that ignores disruptions would exceed it again.
    ensure!(
        !has_condition(&ended, "DisruptionTarget"),
        "{:?}",
        ended.status
    );
    world.finish().await
}

#[tokio::test]
async fn a_container_that_writes_more_than_its_ephemeral_storage_has_its_pod_evicted()
-> anyhow::Result<()> {
    let world = World::new("storage").await?;
    let limit = |storage: &str| {
        let limits = json!({"memory": "64Mi", "ephemeral-storage": storage});
        json!({"requests": {"cpu": "100m"}, "limits": limits})
    };
    let pod = PodBuilder::new("writes")
        .set("resources", limit("2Mi"))
        .sh("dd if=/dev/urandom of=/tmp/x bs=1M count=4; exec sleep 600")
        .container("modest")
        .set("resources", limit("64Mi"))
        .sh("dd if=/dev/urandom of=/tmp/x bs=1M count=4; exec sleep 600");
    world.create(&pod).await?;
    let ended = world.wait_phase("writes", "Failed", PULLED).await?;
    let (reason, message) = why(&ended);
    let expected = "Container main exceeded its local ephemeral storage limit \"2Mi\".";
    ensure!(
        reason == "Evicted" && message.trim_end() == expected,
        "{reason}: {message:?}"
    );
    world.finish().await
}

#[tokio::test]
async fn memory_is_mounted_at_dev_shm_and_volumes_anywhere_below_dev() -> anyhow::Result<()> {
    let world = World::new("below-dev").await?;
    config_map(&world, "map", &["k=value"]).await?;
    let shm = json!({"name": "shm", "mountPath": "/dev/shm"});
    let pod = PodBuilder::new("devices")
        .spec(
            "volumes",
            json!([
                {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "128Mi"}},
                {"name": "huge", "emptyDir": {}},
                {"name": "inner", "emptyDir": {"medium": "Memory"}},
                {"name": "queue", "emptyDir": {}},
                {"name": "map", "configMap": {"name": "map"}},
            ]),
        )
        .memory("256Mi")
        .set(
            "volumeMounts",
            json!([
                {"name": "inner", "mountPath": "/dev/hugecache/inner"},
                {"name": "map", "mountPath": "/dev/a/b"},
                {"name": "map", "mountPath": "/dev/one", "subPath": "k"},
                {"name": "inner", "mountPath": "/dev/shm/inner"},
                {"name": "map", "mountPath": "/dev/mqueue/map"},
                {"name": "queue", "mountPath": "/dev/mqueue"},
                {"name": "huge", "mountPath": "/dev/hugecache"},
                shm,
            ]),
        )
        .sh("cat /dev/shm/mark; dd if=/dev/zero of=/dev/shm/big bs=1M count=96 2>/dev/null; stat -c %s /dev/shm/big; \
             stat -f -c %T /dev/shm; touch /dev/hugecache/x && echo inner >/dev/hugecache/inner/y && cat /dev/shm/inner/y; \
             stat -f -c %T /dev/hugecache/inner/; echo $(cat /dev/a/b/k) $(cat /dev/one) $(cat /dev/mqueue/map/k); \
             for d in null zero random urandom tty full; do [ -c /dev/$d ] || echo no $d; done; echo x >/dev/null && echo done")
        .init_container("first")
        .set("volumeMounts", json!([shm]))
        .sh("echo from-init >/dev/shm/mark");
    let log = log_of(&world, &pod).await?;
    let wanted = "from-init\n100663296\ntmpfs\ninner\ntmpfs\nvalue value value\ndone\n";
    same("below /dev", &log, wanted)?;
    world.finish().await
}

#[tokio::test]
async fn the_containers_of_a_pod_share_one_dev_shm_and_no_other() -> anyhow::Result<()> {
    let world = World::new("shared-shm").await?;
    let pod = PodBuilder::new("shares")
        .sh("cat /dev/shm/mark; stat -f -c %T /dev/shm; stat -c %a /dev/shm; ls /dev/shm")
        .init_container("first")
        .sh("echo from-init >/dev/shm/mark");
    let log = log_of(&world, &pod).await?;
    same("/dev/shm", &log, "from-init\ntmpfs\n1777\nmark\n")?;
    let log = log_of(
        &world,
        &PodBuilder::new("other").sh("ls -A /dev/shm; echo done"),
    )
    .await?;
    same("/dev/shm of another pod", &log, "done\n")?;
    world.finish().await
}

#[tokio::test]
async fn files_of_an_image_in_temporary_folders_are_visible() -> anyhow::Result<()> {
    let world = World::new("temporary").await?;
    let image = places("1");
    let as_it_is = PodBuilder::new("runs")
        .image(&image)
        .set("command", Value::Null);
    let log = log_of(&world, &as_it_is).await?;
    same(
        "the image's own program",
        &log,
        "the program of the image\n",
    )?;
    let volume = |place: &str| json!([{"name": "v", "mountPath": place}]);
    let look = "ls /tmp /var/tmp | tr '\\n' ' '; echo; cat /var/tmp/data; stat -c %a /tmp /var/tmp; \
                touch /tmp/new /var/tmp/new && echo written";
    for (name, place, wanted) in [
        (
            "beside",
            "/srv/x",
            "/tmp: app  /var/tmp: data \ndata\n1777\n1777\nwritten\n",
        ),
        (
            "below",
            "/tmp/x",
            "/tmp: app x  /var/tmp: data \ndata\n1777\n1777\nwritten\n",
        ),
        (
            "deep",
            "/var/tmp/a/b",
            "/tmp: app  /var/tmp: a data \ndata\n1777\n1777\nwritten\n",
        ),
        (
            "at",
            "/tmp",
            "/tmp:  /var/tmp: data \ndata\n777\n1777\nwritten\n",
        ),
    ] {
        let pod = PodBuilder::new(name).image(&image).sh(look);
        let pod = pod.spec("volumes", json!([{"name": "v", "emptyDir": {}}]));
        let log = log_of(&world, &pod.set("volumeMounts", volume(place))).await?;
        same(name, &log, wanted)?;
    }
    // As with other runtimes, a read-only root has no exceptions.
    let pod = PodBuilder::new("read-only").image(&image);
    let pod = pod.set("securityContext", json!({"readOnlyRootFilesystem": true}));
    let pod = pod.spec("volumes", json!([{"name": "v", "emptyDir": {}}]));
    let pod = pod.set("volumeMounts", volume("/var/tmp"));
    let pod = pod.sh("cat /tmp/app/run | tail -1; touch /tmp/x 2>/dev/null || echo refused; touch /var/tmp/x && echo written");
    let log = log_of(&world, &pod).await?;
    same(
        "a read-only root",
        &log,
        "echo the program of the image\nrefused\nwritten\n",
    )?;
    world.finish().await
}

#[tokio::test]
async fn an_image_of_one_program_gets_the_files_that_programs_need() -> anyhow::Result<()> {
    let world = World::new("bare").await?;
    let image = PodBuilder::image_name().replace("busybox:latest", "bare:1");
    let pod = PodBuilder::new("as-it-is")
        .image(&image)
        .set("command", Value::Null);
    same("its program", &log_of(&world, &pod).await?, "bare\n")?;
    let look = "b=/busybox; echo $HOME; $b pwd; echo x >/tmp/a && echo y >/var/tmp/b && $b stat -c %a /tmp /var/tmp; \
                $b cat /volume/deep/k; echo; [ -c /dev/null ] && [ -r /etc/hosts ] && [ -r /proc/self/status ] && echo all";
    config_map(&world, "map", &["k=value"]).await?;
    let pod = PodBuilder::new("looks")
        .image(&image)
        .command(["/busybox", "sh", "-c", look]);
    let pod = pod.spec(
        "volumes",
        json!([{"name": "map", "configMap": {"name": "map"}}]),
    );
    let pod = pod.set(
        "volumeMounts",
        json!([{"name": "map", "mountPath": "/volume/deep"}]),
    );
    let log = log_of(&world, &pod).await?;
    same("what it has", &log, "/\n/\n1777\n1777\nvalue\nall\n")?;
    world.finish().await
}

#[tokio::test]
async fn volumes_can_be_mounted_inside_each_other_in_any_order() -> anyhow::Result<()> {
    let world = World::new("nested").await?;
    config_map(&world, "map", &["k=value"]).await?;
    let mount = |name: &str, place: &str| json!({"name": name, "mountPath": place});
    let file = |place: &str| json!({"name": "map", "mountPath": place, "subPath": "k"});
    let pod = PodBuilder::new("nested")
        .image(&places("1"))
        .spec(
            "volumes",
            json!([
                {"name": "one", "emptyDir": {}}, {"name": "two", "emptyDir": {}}, {"name": "three", "emptyDir": {"medium": "Memory"}},
                {"name": "map", "configMap": {"name": "map"}}, {"name": "etc", "emptyDir": {}},
            ]),
        )
        .set(
            "volumeMounts",
            json!([
                mount("three", "/x/y/z"), mount("two", "/x/y/"), mount("one", "/x"),
                mount("two", "/map/inner"), mount("map", "/map"), file("/x/file"),
                // Paths at which the image has links, files, and folders with files.
                mount("one", "/var/run/mine"), mount("two", "/data/mine"), file("/root/file"), file("/home/jovyan/file"),
                mount("one", "/home/jovyan/work"), mount("etc", "/etc"), file("/etc/own"),
            ]),
        )
        .sh("echo 1 >/x/1; echo 2 >/x/y/2; echo 3 >/x/y/z/3; cat /map/k /map/inner/2 /x/file; echo; \
             cat /run/mine/1 /mnt/mine/2 /root/file /home/jovyan/file /home/jovyan/work/1; cat /run/own/file; \
             cat /etc/own; echo; grep -q localhost /etc/hosts && echo 1; [ -e /etc/resolv.conf ] && echo resolves; ls /etc");
    let log = log_of(&world, &pod).await?;
    let wanted = "value2\nvalue\n1\n2\nvaluevalue1\nin run/own\nvalue\n1\nresolves\nhostname\nhosts\nown\nresolv.conf\n";
    same("what is mounted", &log, wanted)?;
    world.finish().await
}

/// Prints HOME and the home folder in the user's line of `passwd`, as the container sees them.
const WHO: &str = "echo $HOME $(awk -F: -v u=$(id -u) '$3 == u {print $6, $7}' /etc/passwd); id -un >/dev/null && echo named";

#[tokio::test]
async fn home_is_that_of_the_images_user() -> anyhow::Result<()> {
    let world = World::new("home").await?;
    let of = |pod: PodBuilder, tag: &str| pod.image(&places(tag)).sh(WHO);
    let pod = of(PodBuilder::new("homes"), "1");
    let pod = of(pod.container("name"), "name");
    let pod = of(pod.container("root"), "root");
    let pod = of(pod.container("unknown"), "unknown");
    let pod = of(pod.container("same"), "same");
    let pod =
        of(pod.container("as-user"), "root").set("securityContext", json!({"runAsUser": 1000}));
    let pod = of(pod.container("as-root"), "1").set("securityContext", json!({"runAsUser": 0}));
    let pod =
        of(pod.container("given"), "1").set("env", json!([{"name": "HOME", "value": "/mine"}]));
    let pod = of(pod.container("empty"), "1").set("env", json!([{"name": "HOME", "value": ""}]));
    log_of(&world, &pod).await?;
    for (container, wanted) in [
        ("main", "/home/jovyan /home/jovyan /bin/ash"),
        ("name", "/home/jovyan /home/jovyan /bin/ash"),
        ("root", "/root /root /bin/sh"),
        ("unknown", "/ / /bin/sh"),
        ("same", "/home/same /home/same /bin/sh"),
        ("as-user", "/home/jovyan /home/jovyan /bin/ash"),
        ("as-root", "/root /root /bin/sh"),
        ("given", "/mine /home/jovyan /bin/ash"),
        ("empty", "/home/jovyan /home/jovyan /bin/ash"),
    ] {
        let log = world.logs("homes", container).await?;
        same(container, &log, &format!("{wanted}\nnamed\n"))?;
    }
    world.finish().await
}

#[tokio::test]
async fn a_home_is_writable_and_a_command_that_comes_later_has_it_too() -> anyhow::Result<()> {
    let world = World::new("own-home").await?;
    let pod = PodBuilder::new("home").image(&places("1"));
    let uid = world
        .running(&pod.sh("cat file && pwd && touch f ~/g; sleep 600"))
        .await?;
    let exec = world.exec(
        &uid,
        "main",
        [
            "sh",
            "-c",
            "until [ -e ~/g ]; do sleep 0.1; done; echo $HOME; ls ~",
        ],
    );
    let said = format!("{}\n", exec.ok().await?.text());
    same("an exec", &said, "/home/jovyan\nf\nfile\ng\n")?;
    world.wait_log("home", "main", "\n/home/jovyan\n").await?;
    let log = world.logs("home", "main").await?;
    same("the program", &log, "in home/jovyan\n/home/jovyan\n")?;
    world.delete("home", Some(0)).await?;
    world.finish().await
}

#[tokio::test]
async fn a_container_without_a_command_says_so() -> anyhow::Result<()> {
    let world = World::new("no-command").await?;
    let pod = PodBuilder::new("nothing").image(&places("nocmd"));
    world.create(&pod.set("command", Value::Null)).await?;
    let failed = world.wait_phase("nothing", "Failed", PULLED).await?;
    let (reason, message) = container_reason(&failed, "main").context("no reason")?;
    ensure!(
        reason == "CreateContainerError" && message.contains("no command specified"),
        "{reason}: {message}"
    );
    world.delete("nothing", None).await?;
    world.wait_gone("nothing", SOON).await?;
    world.finish().await
}
