//! attach, port-forward and cp: the requests that the agent gets, and the output that the user sees.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{Shutdown, TcpStream},
    process::Child,
};

use rustix::process::{Pid, Signal};

use super::{command, world};

#[tokio::test(flavor = "multi_thread")]
async fn attach_passes_input_output_and_the_programs_code() {
    let world = world();
    let got = world
        .run_with(&["attach", "-i", "u1", "-c", "main"], b"hello")
        .await;
    assert_eq!(
        (got.code, got.text().as_str()),
        (9, "hello"),
        "{}",
        got.stderr
    );
    assert_eq!(got.stderr, "now on\n");
    let asked = world.asked.all();
    assert_eq!(
        asked,
        ["attach u1 main tty=false stdin=true", "stdin closed"]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_detached_client_prints_why_and_what_to_do() {
    let world = world();
    let got = world.run(&["attach", "u1", "-c", "main"]).await;
    assert_eq!(got.code, 1);
    assert!(
        got.stderr.contains("error: detached: too slow\nhint: "),
        "{}",
        got.stderr
    );
    let got = world.run(&["attach", "u1", "-c", "side"]).await;
    assert_eq!(got.code, 1);
    assert!(
        got.stderr
            .contains("attach to u1: container side has no terminal"),
        "{}",
        got.stderr
    );
}

#[expect(clippy::disallowed_methods, reason = "a file of the test's own")]
#[tokio::test(flavor = "multi_thread")]
async fn a_failed_copy_says_what_to_do() {
    let world = world();
    let file = world.folder.path().join("file");
    std::fs::write(&file, "text").unwrap();
    let file = file.to_str().unwrap();
    let got = world.run(&["cp", "/no/such/file", "u1:/tmp/x"]).await;
    assert!(
        got.stderr.contains("read /no/such/file: No such file"),
        "{}",
        got.stderr
    );
    for (arguments, expected) in [
        (
            ["cp", "a", "b"],
            "one of source and destination must be POD:PATH",
        ),
        (
            ["cp", "u1:/a", "u1:/b"],
            "one of source and destination must be POD:PATH",
        ),
        (["cp", "nix:/a", "b"], "the agent knows no pod nix"),
        (["cp", "u1:/", "b"], "names no file or folder"),
        (
            ["cp", "u1:/etc/hosts", file],
            "there is no `tar` in the container",
        ),
        (["cp", file, "u1:/tmp/x"], "no `tar` in the container"),
    ] {
        let got = world.run(&arguments).await;
        assert_eq!(got.code, 1, "{arguments:?}");
        assert!(
            got.stderr.contains(expected),
            "{arguments:?}: {}",
            got.stderr
        );
        assert!(
            got.stderr.contains("hint: "),
            "{arguments:?}: {}",
            got.stderr
        );
    }
}

/// A running `port-forward`, and the local ports that it printed.
struct Forwarding {
    child: Child,
    ports: Vec<u16>,
}

impl Forwarding {
    fn start(world: &super::World, arguments: &[&str], lines: usize) -> Self {
        let mut child = command(world.folder.path(), arguments).spawn().unwrap();
        let mut said = BufReader::new(child.stdout.take().unwrap()).lines();
        let ports = (0..lines).map(|_| {
            let line = said.next().unwrap().unwrap();
            let parts: Vec<&str> = line.split(' ').collect();
            assert_eq!(
                (parts[0], parts[1], parts[3]),
                ("Forwarding", "from", "->"),
                "{line}"
            );
            parts[2].rsplit(':').next().unwrap().parse().unwrap()
        });
        Self {
            ports: ports.collect(),
            child,
        }
    }

    /// Ends it as `^C` does; returns its exit code and stderr.
    fn end(mut self) -> (i32, String) {
        rustix::process::kill_process(Pid::from_child(&self.child), Signal::INT).unwrap();
        let code = self.child.wait().unwrap().code().unwrap_or(-1);
        let mut text = String::new();
        self.child
            .stderr
            .take()
            .unwrap()
            .read_to_string(&mut text)
            .unwrap();
        (code, text)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_are_forwarded_with_their_half_close() {
    let world = world();
    let (asked, said) = tokio::task::block_in_place(|| {
        let forwarding = Forwarding::start(
            &world,
            &[
                "port-forward",
                "--address",
                "127.0.0.1",
                "u1",
                ":80",
                "0:81",
            ],
            2,
        );
        for _ in 0..2 {
            let mut stream = TcpStream::connect(("127.0.0.1", forwarding.ports[0])).unwrap();
            stream.write_all(&super::INPUT[..100_000]).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
            let mut answer = Vec::new();
            stream.read_to_end(&mut answer).unwrap();
            assert!(answer.strip_suffix(b"-end") == Some(&super::INPUT[..100_000]));
        }
        // No program listens there: the connection is reset, and the reason is printed.
        let mut refused = TcpStream::connect(("127.0.0.1", forwarding.ports[1])).unwrap();
        assert!(refused.read(&mut [0]).is_err());
        (world.asked.all(), forwarding.end())
    });
    assert_eq!(asked, ["forward closed", "forward closed"]);
    let (code, text) = said;
    assert_eq!(code, 0, "{text}");
    assert_eq!(
        text.matches("Handling connection for ").count(),
        3,
        "{text}"
    );
    assert!(
        text.contains("reach the port: failed to connect to localhost:81"),
        "{text}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn ports_that_cannot_be_forwarded_are_named() {
    let world = world();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let pair = format!("{port}:80");
    let got = world
        .run(&["port-forward", "--address", "127.0.0.1", "u1", &pair])
        .await;
    assert_eq!(got.code, 1);
    let expected = format!("listen on 127.0.0.1:{port}");
    assert!(
        got.stderr.contains(&expected) && got.stderr.contains("hint: "),
        "{}",
        got.stderr
    );
    let got = world.run(&["port-forward", "done", ":80"]).await;
    assert!(
        got.stderr.contains("the pod done has ended"),
        "{}",
        got.stderr
    );
    for wrong in ["http", "0", "70000"] {
        let got = world.run(&["port-forward", "u1", wrong]).await;
        assert_eq!(got.code, 2, "{wrong}: {}", got.stderr);
    }
}
