//! Level 2: the kubelet, the agent, or both are killed while something in the life of a pod is under way. None of it is lost, begins
//! anew, goes back or happens twice, and it goes on afterwards.

use std::{fs, time::Duration};

use anyhow::ensure;
use k8s_openapi::api::core::v1 as core;
use knoc_tests::{
    site::{Kubelet, Options, Pod, Site},
    wait_for,
};
use kube::{
    Api,
    api::{Patch, PatchParams},
};
use serde_json::{Value, json};

const SOON: Duration = Duration::from_mins(2);

/// No job starts its shim while this file of the site is there.
const HOLD: &str = "hold";

/// What is under way ends once this file of the site is there.
const GO: &str = "go";

const GATE: &str = "example.com/gate";

/// A moment in the life of a pod.
struct Moment {
    pod: &'static str,
    spec: fn(&Scripts) -> Value,
    /// Whether the pod is deleted, with a long grace period, once its program has said `up`.
    deleted: bool,
    /// Is it that moment?
    is: fn(&Value) -> bool,
    /// What the programs of the pod have said at that moment, and in the end.
    said: [&'static str; 2],
    /// The Events of the pod at that moment, by their reasons, and how often they are counted at least.
    events: &'static [(&'static str, i64)],
    /// Is the pod as it should be in the end? `None`: it is gone then.
    end: Option<fn(&Value) -> bool>,
}

/// A container has started once.
const STARTED: &[(&str, i64)] = &[("Created", 1), ("Started", 1), ("SlurmJobStarted", 1)];
const KILLED: &[(&str, i64)] = &[("Created", 1), ("Started", 1), ("Killing", 1)];

static MOMENTS: [Moment; 9] = [
    Moment {
        pod: "post-start",
        spec: |own| {
            let mut main = container("main", "exec sleep 600");
            main["lifecycle"] = json!({"postStart": own.hook()});
            json!({"containers": [main]})
        },
        deleted: false,
        // It is shown as before its program ran.
        is: |pod| {
            reason(main(pod)) == "ContainerCreating"
                && pod["status"]["phase"] == "Pending"
                && main(pod)["containerID"].is_string()
        },
        said: ["hook", "hook hooked"],
        events: STARTED,
        end: Some(ready),
    },
    Moment {
        pod: "pre-stop",
        spec: |own| {
            let mut main = own.until_term("exit 7");
            main["lifecycle"] = json!({"preStop": own.hook()});
            json!({"containers": [main], "terminationGracePeriodSeconds": 600})
        },
        deleted: true,
        is: |pod| runs(main(pod)) && pod["metadata"]["deletionTimestamp"].is_string(),
        said: ["up hook", "up hook hooked term"],
        events: KILLED,
        end: None,
    },
    Moment {
        pod: "grace-period",
        spec: |own| {
            let main = own.until_term("true");
            json!({"containers": [main], "terminationGracePeriodSeconds": 600})
        },
        deleted: true,
        is: |pod| runs(main(pod)) && pod["metadata"]["deletionTimestamp"].is_string(),
        said: ["up term", "up term"],
        events: KILLED,
        end: None,
    },
    Moment {
        pod: "init",
        spec: |own| {
            let first = container("first", &format!("{}; {}", own.say("first"), own.wait()));
            let main = container("main", "exec sleep 600");
            json!({"initContainers": [first], "containers": [main]})
        },
        deleted: false,
        // The ephemeral container waits for the container whose processes it is to see.
        is: |pod| runs(first(pod)) && reason(debug(pod)) == "CreateContainerConfigError",
        said: ["first", "first debug"],
        events: &[("Created", 1), ("Started", 1), ("Failed", 1)],
        end: Some(|pod| {
            ready(pod)
                && runs(debug(pod))
                && first(pod)["restartCount"] == 0
                && first(pod)["state"]["terminated"]["exitCode"] == 0
        }),
    },
    Moment {
        pod: "sidecar",
        spec: |own| {
            let mut side = container("side", &format!("{}; exec sleep 600", own.say("side")));
            side["restartPolicy"] = json!("Always");
            side["startupProbe"] = json!({
                "exec": {"command": ["test", "-e", own.go]}, "periodSeconds": 1, "timeoutSeconds": 60,
                "failureThreshold": 600,
            });
            json!({"initContainers": [side], "containers": [own.once("main")]})
        },
        deleted: false,
        is: |pod| runs(first(pod)) && first(pod)["started"] == false,
        said: ["side", "side main"],
        events: STARTED,
        end: Some(|pod| {
            ready(pod) && first(pod)["ready"] == true && first(pod)["restartCount"] == 0
        }),
    },
    Moment {
        pod: "back-off",
        spec: |own| {
            let main = container("main", &format!("{}; sleep 1; exit 3", own.say("run")));
            json!({"containers": [main], "restartPolicy": "Always"})
        },
        deleted: false,
        is: backs_off,
        // A pause that began anew would end at once, as the first one does.
        said: ["run run", "run run"],
        events: &[("Created", 1), ("Started", 1), ("BackOff", 1)],
        end: Some(backs_off),
    },
    Moment {
        pod: "gate",
        spec: |own| json!({"containers": [own.once("main")], "readinessGates": [{"conditionType": GATE}]}),
        deleted: false,
        is: |pod| ready(pod) && condition(pod, "Ready") == "False",
        said: ["main", "main"],
        events: STARTED,
        end: Some(|pod| ready(pod) && condition(pod, "Ready") == "True"),
    },
    Moment {
        pod: "config",
        spec: |own| {
            let mut main = own.once("main");
            main["envFrom"] = json!([{"configMapRef": {"name": "later"}}]);
            json!({"containers": [main]})
        },
        deleted: false,
        is: |pod| reason(main(pod)) == "CreateContainerConfigError",
        said: ["", "main"],
        events: &[("Failed", 1)],
        end: Some(ready),
    },
    Moment {
        pod: HELD,
        spec: |own| json!({"containers": [own.once("main")]}),
        deleted: false,
        is: |pod| condition(pod, "PodReadyToStartContainers") == "True",
        said: ["", "main"],
        events: &[("SlurmJobStarted", 1)],
        end: Some(ready),
    },
];

/// The pod whose job has no shim yet.
const HELD: &str = "held";

/// The scripts of a pod.
struct Scripts {
    go: String,
    /// The file with what the programs of the pod have said.
    said: String,
}

impl Scripts {
    fn say(&self, word: &str) -> String {
        format!("echo {word} >> {}", self.said)
    }

    fn wait(&self) -> String {
        format!("until test -e {}; do sleep 0.1; done", self.go)
    }

    fn hook(&self) -> Value {
        let (hook, hooked) = (self.say("hook"), self.say("hooked"));
        let script = format!("{hook}; {}; {hooked}", self.wait());
        json!({"exec": {"command": ["/bin/sh", "-c", script]}})
    }

    /// A container that says its name and runs.
    fn once(&self, name: &str) -> Value {
        container(name, &format!("{}; exec sleep 600", self.say(name)))
    }

    /// A container that says when it takes TERM and when it was sent TERM, and then does this.
    fn until_term(&self, then: &str) -> Value {
        let (term, up) = (self.say("term"), self.say("up"));
        let script = format!("trap '{term}; {then}' TERM; {up}; while :; do sleep 0.1; done");
        container("main", &script)
    }
}

fn container(name: &str, script: &str) -> Value {
    json!({"name": name, "image": "none", "command": ["/bin/sh", "-c", script]})
}

fn main(pod: &Value) -> &Value {
    &pod["status"]["containerStatuses"][0]
}

fn first(pod: &Value) -> &Value {
    &pod["status"]["initContainerStatuses"][0]
}

fn debug(pod: &Value) -> &Value {
    &pod["status"]["ephemeralContainerStatuses"][0]
}

fn runs(container: &Value) -> bool {
    container["state"]["running"].is_object()
}

/// Why a container waits.
fn reason(container: &Value) -> &str {
    let reason = &container["state"]["waiting"]["reason"];
    reason.as_str().unwrap_or_default()
}

/// The main container is ready, and was never restarted.
fn ready(pod: &Value) -> bool {
    let main = main(pod);
    runs(main) && main["ready"] == true && main["restartCount"] == 0
}

/// The container waits for its third attempt.
fn backs_off(pod: &Value) -> bool {
    let main = main(pod);
    reason(main) == "CrashLoopBackOff"
        && main["restartCount"] == 1
        && main["lastState"]["terminated"]["exitCode"] == 3
}

/// The status of a condition.
fn condition<'a>(pod: &'a Value, kind: &str) -> &'a str {
    let mut all = pod["status"]["conditions"].as_array().into_iter().flatten();
    let one = all.find(|one| one["type"] == kind);
    one.and_then(|one| one["status"].as_str())
        .unwrap_or_default()
}

/// What no restart may change of a pod's status.
fn facts(pod: &Value) -> Value {
    let status = &pod["status"];
    let conditions = status["conditions"].as_array().into_iter().flatten();
    // An agent that takes long to start makes pods unready for a while.
    let is_gate = pod["metadata"]["name"] == "gate";
    let conditions = conditions.filter(|one| is_gate || one["type"] != "Ready");
    let conditions =
        conditions.map(|one| json!([one["type"], one["status"], one["lastTransitionTime"]]));
    let lists = [
        "initContainerStatuses",
        "containerStatuses",
        "ephemeralContainerStatuses",
    ];
    let containers = lists.iter().map(|list| status[*list].as_array());
    let containers = containers.flatten().flatten().map(|one| {
        json!([
            one["name"],
            reason(one),
            one["state"]["running"],
            one["state"]["terminated"],
            one["lastState"],
            one["ready"],
            one["started"],
            one["restartCount"],
            one["containerID"],
        ])
    });
    json!({
        "phase": status["phase"],
        "conditions": conditions.collect::<Vec<_>>(),
        "containers": containers.collect::<Vec<_>>(),
    })
}

/// A site with a kubelet.
struct World {
    site: Site,
    kubelet: Kubelet,
}

impl World {
    fn pod(&self, name: &str) -> anyhow::Result<Value> {
        self.kubelet.api.get("v1", "pods", "default", name)
    }

    fn pods(&self) -> anyhow::Result<Api<core::Pod>> {
        let config = kube::Config::new(self.kubelet.api.url().parse()?);
        Ok(Api::default_namespaced(kube::Client::try_from(config)?))
    }

    fn scripts(&self, pod: &str) -> Scripts {
        let path = |name: &str| self.site.path(name).display().to_string();
        Scripts {
            go: path(GO),
            said: path(&format!("said-{pod}")),
        }
    }

    /// What the programs of the pod have said.
    fn said(&self, pod: &str) -> String {
        // They have said nothing before there is a file.
        let text = fs::read_to_string(self.scripts(pod).said).unwrap_or_default();
        text.split_whitespace().collect::<Vec<_>>().join(" ")
    }

    fn events(&self, moment: &Moment) -> Vec<(&'static str, i64)> {
        let all = self.kubelet.api.list("v1", "events", "default");
        let count = |reason: &str| {
            let such = all.iter().filter(|event| {
                event["involvedObject"]["name"] == moment.pod && event["reason"] == reason
            });
            such.filter_map(|event| event["count"].as_i64())
                .sum::<i64>()
        };
        let reasons = moment.events.iter();
        reasons
            .map(|(reason, _)| (*reason, count(reason)))
            .collect()
    }

    /// What no restart may change.
    fn seen(&self) -> anyhow::Result<Vec<Value>> {
        let of = |moment: &Moment| {
            let (said, events) = (self.said(moment.pod), self.events(moment));
            let facts = facts(&self.pod(moment.pod)?);
            anyhow::Ok(json!({"pod": moment.pod, "facts": facts, "said": said, "events": events}))
        };
        MOMENTS.iter().map(of).collect()
    }

    fn create(&self, moment: &Moment) -> anyhow::Result<String> {
        let spec = (moment.spec)(&self.scripts(moment.pod));
        self.kubelet.create_pod(moment.pod, spec)
    }

    async fn comes(&self, moment: &Moment) -> anyhow::Result<()> {
        let what = format!("the moment of {}", moment.pod);
        wait_for(&what, SOON, async || {
            let pod = self.pod(moment.pod).map_err(|error| error.to_string())?;
            let (said, events) = (self.said(moment.pod), self.events(moment));
            let mut least = events.iter().zip(moment.events);
            let recorded = least.all(|(now, least)| now.1 >= least.1);
            if (moment.is)(&pod) && said == moment.said[0] && recorded {
                Ok(())
            } else {
                Err(format!("said {said:?}, {events:?}, {:#}", pod["status"]))
            }
        })
        .await
    }

    async fn ends(&self, moment: &Moment) -> anyhow::Result<()> {
        let what = format!("the end of {}", moment.pod);
        wait_for(&what, SOON, async || {
            let (pod, said) = (self.pod(moment.pod).ok(), self.said(moment.pod));
            let ended = match (&pod, moment.end) {
                (Some(pod), Some(is)) => is(pod),
                (None, None) => true,
                (Some(_), None) | (None, Some(_)) => false,
            };
            if ended && said == moment.said[1] {
                Ok(())
            } else {
                Err(format!("said {said:?}, {pod:#?}"))
            }
        })
        .await
    }

    /// Creates all pods and brings each to its moment. Returns the UID of the first one.
    async fn begin(&self) -> anyhow::Result<String> {
        let (held, others): (Vec<_>, Vec<_>) = MOMENTS.iter().partition(|one| one.pod == HELD);
        let uids = others.iter().map(|moment| self.create(moment));
        let uids = uids.collect::<anyhow::Result<Vec<_>>>()?;
        for moment in others.iter().filter(|moment| moment.deleted) {
            wait_for(moment.pod, SOON, async || {
                let (pod, said) = (self.pod(moment.pod)?, self.said(moment.pod));
                ensure!(runs(main(&pod)) && said == "up", "{said:?}, {pod:#}");
                Ok(())
            })
            .await?;
            let default = json!({});
            let api = &self.kubelet.api;
            api.delete("pods", "default", moment.pod, &default)?;
        }
        wait_for("the init container runs", SOON, async || {
            let pod = self.pod("init")?;
            ensure!(runs(first(&pod)), "{pod:#}");
            Ok(())
        })
        .await?;
        let mut debug = self.scripts("init").once("debug");
        debug["targetContainerName"] = json!("main");
        let debug =
            json!({"metadata": {"generation": 2}, "spec": {"ephemeralContainers": [debug]}});
        let pods = self.pods()?;
        let patch = Patch::Merge(&debug);
        pods.patch("init", &PatchParams::default(), &patch).await?;
        for moment in &others {
            self.comes(moment).await?;
        }
        self.site.put(HOLD, "")?;
        for moment in held {
            self.create(moment)?;
            self.comes(moment).await?;
        }
        Ok(uids.into_iter().next().unwrap_or_default())
    }

    /// Everything goes on.
    async fn go_on(&self) -> anyhow::Result<()> {
        fs::remove_file(self.site.path(HOLD))?;
        self.site.put(GO, "")?;
        let api = &self.kubelet.api;
        let later = json!({"metadata": {"name": "later"}, "data": {"KEY": "value"}});
        api.create("v1", "configmaps", "default", later)?;
        let soon = json!({"gracePeriodSeconds": 1});
        api.delete("pods", "default", "grace-period", &soon)?;
        let open = json!({"status": {"conditions": [{"type": GATE, "status": "True"}]}});
        let (pods, patch) = (self.pods()?, Patch::Strategic(&open));
        let params = PatchParams::default();
        pods.patch_status("gate", &params, &patch).await?;
        Ok(())
    }

    /// Creates a pod that the kubelet rejects once it knows what the agent has. Then it has looked at all others too.
    fn misplaced(&self, name: &str) -> anyhow::Result<()> {
        let containers = json!([container("main", "true")]);
        let spec = json!({"nodeSelector": {"no": "such-node"}, "containers": containers});
        self.kubelet.create_pod(name, spec).map(drop)
    }

    /// What no restart may change, once all Events of before are written: they are written in order.
    async fn before(&self) -> anyhow::Result<Vec<Value>> {
        self.misplaced("before")?;
        wait_for("the Event of a pod that is rejected", SOON, async || {
            let all = self.kubelet.api.list("v1", "events", "default");
            let mut about = all.iter().map(|event| &event["involvedObject"]["name"]);
            ensure!(about.any(|name| name == "before"), "{all:#?}");
            Ok(())
        })
        .await?;
        self.seen()
    }

    /// Checks that a restart has changed nothing. `uid`: that of a pod whose shim is linked.
    async fn unchanged(&self, restarted: &str, uid: &str, before: &[Value]) -> anyhow::Result<()> {
        let name = format!("after-{restarted}");
        self.misplaced(&name)?;
        let (client, linked) = (self.site.client()?, Pod::new(uid, Vec::new()));
        let changed = wait_for(&name, SOON, async || {
            let now = self.seen().map_err(|error| error.to_string())?;
            if now != before {
                return Ok(Some(now));
            }
            let linked = linked.observe(&client).await?.shim_connected;
            let pod = self.pod(&name).map_err(|error| error.to_string())?;
            if linked && pod["status"]["phase"] == "Failed" {
                Ok(None)
            } else {
                Err(format!("linked {linked}, {:#}", pod["status"]))
            }
        })
        .await?;
        ensure!(
            changed.is_none(),
            "restart of {restarted}: {changed:#?}\n{before:#?}"
        );
        Ok(())
    }
}

#[tokio::test]
async fn what_is_under_way_outlives_the_kubelet_and_the_agent() -> anyhow::Result<()> {
    let site = Site::new(Options {
        prelude: format!("while [ -e \"$HOME/{HOLD}\" ]; do sleep 0.05; done\n"),
        ..Options::default()
    })?;
    // A container that crashes is restarted at once, and then after an hour.
    let config = fs::read_to_string(site.path("agent.toml"))?;
    let long = config.replace(
        "initial = \"200ms\"\nmax = \"2s\"",
        "initial = \"1h\"\nmax = \"2h\"",
    );
    ensure!(long != config, "no back-off in {config}");
    site.put("agent.toml", &long)?;
    let mut agent = site.agent(&[]).await?;
    let kubelet = Kubelet::prepare(&site).await?;
    let mut process = Some(kubelet.start(&site, &[]).await?);
    let world = World { site, kubelet };
    let uid = world.begin().await?;
    let before = world.before().await?;
    for restarted in ["kubelet", "agent", "both"] {
        if let Some(old) = process.take_if(|_| restarted != "agent") {
            old.kill().await?;
        }
        if restarted != "kubelet" {
            agent.kill().await?;
            agent = world.site.agent(&[]).await?;
        }
        if process.is_none() {
            process = Some(world.kubelet.start(&world.site, &[]).await?);
        }
        world.unchanged(restarted, &uid, &before).await?;
    }
    world.go_on().await?;
    for moment in &MOMENTS {
        world.ends(moment).await?;
    }
    drop((agent, process));
    Ok(())
}
