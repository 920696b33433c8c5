//! The checks for each verb: one pod per client, whose containers are the other ends of its streams.

use std::time::Duration;

use anyhow::ensure;
use serde_json::json;
use sha2::{Digest as _, Sha256};

use super::clients::{Client, Verb};
use super::target::Target;
use crate::{
    Background, PodBuilder, Run, Terminal, World, ports::some_port, wait_for, world::SOON,
};

/// The number of bytes in each stream.
const SIZE: usize = 1 << 20;

/// The pod's name.
const POD: &str = "target";

/// The time limit for the next output of a stream.
const OUTPUT_LIMIT: Duration = Duration::from_mins(2);

/// A client and its pod.
#[derive(Debug)]
pub struct Scene {
    /// The test's namespace, in which the pod runs.
    pub world: World,
    /// The client under test.
    pub client: Client,
    /// The port of a server that answers a line `N` with N bytes, and closes.
    request_port: u16,
    /// The port of a server that answers the end of its input with its checksum, and closes.
    sum_port: u16,
}

impl Scene {
    /// Creates the pod and waits until it runs and serves.
    pub async fn set(world: World, client: Client) -> anyhow::Result<Self> {
        let request_port = some_port();
        let scene = Self {
            world,
            client,
            request_port,
            sum_port: request_port + 1,
        };
        scene.world.create(&scene.pod()).await?;
        let running = scene.world.wait_phase(POD, "Running", SOON).await?;
        ensure!(
            running.status.is_some_and(|status| status.reason.is_none()),
            "a running pod with a reason"
        );
        for port in [scene.request_port, scene.sum_port] {
            scene.world.wait_listens(POD, "server", port).await?;
        }
        let made = "until [ -d /tmp/cp ]; do sleep 0.1; done";
        let made = ["exec", POD, "-c", "main", "--", "sh", "-c", made];
        scene.world.kubectl(made).ok().await?;
        Ok(scene)
    }

    fn pod(&self) -> PodBuilder {
        let (request, sum) = (self.request_port, self.sum_port);
        let shared = json!([{"name": "shared", "mountPath": "/shared"}]);
        PodBuilder::new(POD)
            .sh("mkdir -p /tmp/cp && exec sleep 3600")
            .set("volumeMounts", shared.clone())
            .container("talk")
            .set("stdin", json!(true))
            .sh("read line; echo \"out $line\"; echo \"err $line\" >&2")
            .container("log")
            .set("volumeMounts", shared)
            .sh("echo first; until [ -e /shared/go ]; do sleep 0.1; done; seq 5; echo last")
            .container("server")
            .sh(&format!(
                "nc -ll -p {sum} -e sha256sum & \
                 exec nc -ll -p {request} -e sh -c 'read n; head -c $n /dev/zero'"
            ))
            .spec("volumes", json!([{"name": "shared", "emptyDir": {}}]))
    }

    /// Makes the client run the verb; an error says what happened instead.
    pub async fn check(&self, verb: Verb) -> anyhow::Result<()> {
        match verb {
            Verb::Exec => self.exec().await,
            Verb::Input => self.input().await,
            Verb::EndOfInput => self.end_of_input().await,
            Verb::Terminal => self.terminal().await,
            Verb::Attach => self.attach().await,
            Verb::PortForward => self.port_forward().await,
            Verb::HalfClose => self.half_close().await,
            Verb::Follow => self.follow().await,
            Verb::Copy => self.copy().await,
        }
    }

    fn target<'a>(&'a self, container: &'a str) -> Target<'a> {
        Target {
            namespace: &self.world.namespace,
            pod: POD,
            container,
        }
    }

    fn call(&self, verb: &str, container: &str, rest: &[&str]) -> Run {
        self.client.call(verb, self.target(container), rest)
    }

    async fn exec(&self) -> anyhow::Result<()> {
        let script = "echo out; echo err >&2; exit 9";
        let output = self.call("exec", "main", &["sh", "-c", script]).output();
        let output = output.await?;
        ensure!(
            output.code == 9 && output.stdout == b"out\n",
            "9, out and err were expected: {output}"
        );
        // kubectl appends a line about the exit code.
        ensure!(output.stderr.starts_with("err\n"), "{output}");
        let missing = self.call("exec", "main", &["/no/such/program"]).output();
        let missing = missing.await?;
        ensure!(
            missing.code != 0 && missing.stderr.contains("/no/such/program"),
            "the missing program was to be named: {missing}"
        );
        Ok(())
    }

    async fn input(&self) -> anyhow::Result<()> {
        let bytes = random();
        let count = SIZE.to_string();
        let run = self.call("exec-stdin", "main", &["head", "-c", &count]);
        let output = run.stdin(bytes.clone()).ok().await?;
        same(&output.stdout, &bytes)
    }

    async fn end_of_input(&self) -> anyhow::Result<()> {
        let run = self.call("exec-stdin", "main", &["sha256sum"]);
        let bytes = random();
        let output = run.stdin(bytes.clone()).ok().await?;
        ensure!(output.text().starts_with(&sum(&bytes)), "{output}");
        Ok(())
    }

    async fn terminal(&self) -> anyhow::Result<()> {
        let command = self
            .client
            .command_line("exec-tty", self.target("main"), &["sh"]);
        let args: Vec<&str> = command[1..].iter().map(String::as_str).collect();
        let mut terminal = Terminal::start(&command[0], &args, 33, 101)?;
        // The size is not ordered with the input, so the question is repeated until the size has arrived.
        wait_for("the terminal's size", OUTPUT_LIMIT, async || {
            terminal.type_text("stty size; tty\n")?;
            tokio::time::sleep(Duration::from_millis(300)).await;
            let shown = terminal.shown();
            ensure!(shown.contains("33 101") && shown.contains("/dev/"), shown);
            Ok(())
        })
        .await?;
        terminal.type_text("exit 7\n")?;
        let shown = terminal.shown();
        let code = terminal.exit_code().await?;
        ensure!(code == Some(7), "7 was expected: {code:?}; shown: {shown}");
        Ok(())
    }

    async fn attach(&self) -> anyhow::Result<()> {
        let run = self.call("attach", "talk", &[]).stdin("hello\n");
        let output = run.ok().await?;
        ensure!(output.stdout == b"out hello\n", "{output}");
        ensure!(output.stderr.contains("err hello\n"), "{output}");
        Ok(())
    }

    async fn port_forward(&self) -> anyhow::Result<()> {
        let request = format!("{SIZE}\n").into_bytes();
        let target = self.target("server");
        let answer = self.client.forward(target, self.request_port, request);
        same(&answer.await?, &vec![0; SIZE])
    }

    async fn half_close(&self) -> anyhow::Result<()> {
        let bytes = random();
        let target = self.target("server");
        let forwarded = self.client.forward(target, self.sum_port, bytes.clone());
        let answer = String::from_utf8(forwarded.await?)?;
        ensure!(answer.starts_with(&sum(&bytes)), "{answer:?}");
        Ok(())
    }

    async fn follow(&self) -> anyhow::Result<()> {
        let mut follower = Background::start(self.call("logs", "log", &[]))?;
        follower.expect("first\n").await?;
        self.world
            .kubectl(["exec", POD, "-c", "main", "--", "touch", "/shared/go"])
            .ok_or_killed()
            .await?;
        let code = follower.exit_code(OUTPUT_LIMIT).await?;
        let shown = follower.shown();
        ensure!(
            code == 0 && shown == "first\n1\n2\n3\n4\n5\nlast\n",
            "{code}; shown: {shown:?}"
        );
        Ok(())
    }

    async fn copy(&self) -> anyhow::Result<()> {
        let folder = tempfile::tempdir()?;
        let (there, back) = (folder.path().join("there"), folder.path().join("back"));
        std::fs::create_dir(&there)?;
        std::fs::create_dir(&back)?;
        let bytes = random();
        tokio::fs::write(there.join("data"), &bytes).await?;
        let [there, back] = [there, back].map(|path| path.display().to_string());
        let to = self.call("cp-to", "main", &[&there, "/tmp/cp", "data"]);
        to.ok().await?;
        let from = self.call("cp-from", "main", &["/tmp/cp", &back, "data"]);
        from.ok().await?;
        same(&std::fs::read(folder.path().join("back/data"))?, &bytes)
    }
}

fn random() -> Vec<u8> {
    let mut bytes = vec![0; SIZE];
    rand::fill(&mut bytes[..]);
    bytes
}

fn sum(bytes: &[u8]) -> String {
    format!("{:x}", Sha256::digest(bytes))
}

/// Checks that the bytes are equal. The error has the position of the first difference.
fn same(found: &[u8], expected: &[u8]) -> anyhow::Result<()> {
    let pairs = found.iter().zip(expected);
    let parted = pairs.take_while(|(left, right)| left == right).count();
    ensure!(
        found == expected,
        "{} of {} bytes came, the first {parted} as sent",
        found.len(),
        expected.len()
    );
    Ok(())
}
