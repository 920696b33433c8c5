//! SIF files in the site's container library (`library://`), by a separate agent on the login node. The library is a small server of this
//! test, from which the real `apptainer pull` fetches the same file.

use std::time::Duration;

use anyhow::ensure;
use knoc_tests::{
    Run, World,
    background::Background,
    ports::free_port,
    second_agent::{PLAIN, SecondAgent},
    world::SOON,
};

/// The time for a pull by Apptainer.
const PULLED: Duration = Duration::from_mins(5);

/// The address of this host on the network of the login node.
const HOST: &str = "10.77.0.1";

/// A library with one file, under each tag of two containers. One is open, and the other one demands a token and redirects to where
/// the file is.
const LIBRARY: &str = r#"
import hashlib, http.server, json, sys

with open(sys.argv[2], "rb") as opened:
    file = opened.read()

class Library(http.server.BaseHTTPRequestHandler):
    def answer(self, status, body, location=None):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if location:
            self.send_header("Location", location)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        path, _, query = self.path.partition("?")
        place, _, tag = path.partition(":")
        known = self.headers.get("Authorization") == "Bearer token-of-the-site"
        if path == "/store":
            self.answer(403 if "Authorization" in self.headers and not known else 200, file)
        elif query != "arch=amd64" or not tag:
            self.answer(404, b"")
        elif place == "/v1/imagefile/alice/tools/one":
            self.answer(200, file)
        elif place == "/v1/imagefile/alice/private/one" and known:
            self.answer(303, b"", "/store")
        elif place == "/v1/images/alice/tools/one" or (place == "/v1/images/alice/private/one" and known):
            digest = "sha256." + hashlib.sha256(file).hexdigest()
            about = {"id": "1", "hash": digest, "size": len(file), "uploaded": True, "arch": "amd64"}
            self.answer(200, json.dumps({"data": about}).encode())
        else:
            self.answer(404, json.dumps({"error": {"code": 404, "message": "no such image here"}}).encode())

server = http.server.ThreadingHTTPServer(("0.0.0.0", int(sys.argv[1])), Library)
print("it listens", flush=True)
server.serve_forever()
"#;

/// Runs a pod with that image to its end.
async fn runs(agent: &SecondAgent<'_>, name: &str, image: &str) -> anyhow::Result<()> {
    let (_, log) = agent.run(name, image).await?;
    ensure!(log.contains("it runs"), "{image}: {log}");
    Ok(())
}

#[tokio::test]
async fn a_file_of_the_library_runs_and_is_the_one_that_apptainer_pulls() -> anyhow::Result<()> {
    let world = World::new("library").await?;
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("busybox.sif");
    let sif = world.on("login", ["cat", "/images/busybox.sif"]);
    tokio::fs::write(&file, sif.ok().await?.stdout).await?;
    let port = free_port()?;
    let serve = Run::new("python3").args(["-c", LIBRARY, &port.to_string()]);
    let mut library = Background::start(serve.arg(&file))?;
    library.expect("it listens").await?;
    let address = format!("http://{HOST}:{port}");
    let token = format!("/home/hpcuser/{}/token", world.namespace);
    let settings = format!("library = \"{address}\"\nlibrary_token = \"{token}\"");
    let agent = SecondAgent::start(&world, PLAIN, &settings).await?;
    let write = format!("umask 077; cat >{token}");
    let write = world.on("login", ["sh", "-c", &write]);
    write.stdin("token-of-the-site\n").ok().await?;
    runs(&agent, "named", "library://alice/tools/one:1").await?;
    // What the agent keeps is the file that Apptainer gets.
    let home = agent.home();
    let pull = format!(
        "export HOME={home}; cd {home}; apptainer pull --disable-cache --library {address} pulled.sif library://alice/tools/one:1; \
         cmp pulled.sif .local/state/knoc/images/sha256-*.sif"
    );
    let pull = world.on("login", ["sh", "-c", &pull]);
    pull.deadline(PULLED).ok().await?;
    let full = format!("library://{HOST}:{port}/alice/private/one:1");
    runs(&agent, "private", &full).await?;
    let missing = agent
        .submit("missing", "library://alice/tools/two:1")
        .await?;
    agent.described(&missing, "no such image here").await?;
    agent.knocctl(&format!("delete {missing}")).ok().await?;
    // Other users could read the token.
    let open = world.on("login", ["chmod", "644", &token]);
    open.deadline(SOON).ok().await?;
    let refused = agent.submit("open", "library://alice/tools/one:2").await?;
    agent.described(&refused, "mode 0600").await?;
    agent.knocctl(&format!("delete {refused}")).ok().await?;
    agent.stop().await?;
    library.kill().await?;
    world.finish().await
}
