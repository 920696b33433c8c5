//! kubectl as a client: the contract in its words, and its port-forward, which listens here.

use std::{net::Ipv4Addr, time::Duration};

use anyhow::Context as _;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use super::clients::Target;
use crate::{Run, wait_for};

/// Until it listens on its local port.
const LISTENS: Duration = Duration::from_secs(20);

/// Runs `kubectl port-forward` as these words, sends bytes and their end through it, and answers what came back until
/// the other side closed. kubectl would serve on: it is ended.
pub(super) async fn forward(words: &[String], bytes: &[u8]) -> anyhow::Result<Vec<u8>> {
    let folder = tempfile::tempdir()?;
    let log = folder.path().join("log");
    let kubectl = Run::new(&words[0]).args(&words[1..]).spawn(&log)?;
    let local = wait_for("kubectl port-forward listens", LISTENS, async || {
        let shown = std::fs::read_to_string(&log).map_err(|error| error.to_string())?;
        local_port(&shown).ok_or(shown)
    })
    .await?;
    let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, local)).await?;
    let (mut reader, mut writer) = stream.into_split();
    let mut answer = Vec::new();
    let request = async {
        writer.write_all(bytes).await?;
        writer.shutdown().await
    };
    let (sent, read) = tokio::join!(request, reader.read_to_end(&mut answer));
    let words = || std::fs::read_to_string(&log).unwrap_or_default();
    sent.and(read).with_context(words)?;
    drop(kubectl);
    Ok(answer)
}

/// `Forwarding from 127.0.0.1:40123 -> 7000`
fn local_port(shown: &str) -> Option<u16> {
    let (_, rest) = shown.split_once("Forwarding from 127.0.0.1:")?;
    rest.split_once(" ->")?.0.parse().ok()
}

/// A call of the contract in kubectl's words.
pub(super) fn words(verb: &str, target: Target<'_>, rest: &[&str]) -> Vec<String> {
    let Target {
        namespace,
        pod,
        container,
    } = target;
    let remote = |folder: &str, name: &str| format!("{pod}:{folder}/{name}");
    let mut words: Vec<String> = vec!["--namespace".into(), namespace.into()];
    let mut add = |more: &[&str]| words.extend(more.iter().map(|&word| word.into()));
    match (verb, rest) {
        ("exec", _) => add(&["exec", pod, "-c", container, "--"]),
        ("exec-stdin", _) => add(&["exec", "-i", pod, "-c", container, "--"]),
        ("exec-tty", _) => add(&["exec", "-it", pod, "-c", container, "--"]),
        ("attach", _) => add(&["attach", "-i", pod, "-c", container]),
        ("port-forward", _) => add(&["port-forward", pod]),
        ("logs", _) => add(&["logs", "-f", pod, "-c", container]),
        ("cp-to", [local, folder, name]) => {
            let local = format!("{local}/{name}");
            add(&[
                "cp",
                "--retries=0",
                "-c",
                container,
                &local,
                &remote(folder, name),
            ]);
        }
        ("cp-from", [folder, local, name]) => {
            let local = format!("{local}/{name}");
            add(&[
                "cp",
                "--retries=0",
                "-c",
                container,
                &remote(folder, name),
                &local,
            ]);
        }
        _ => add(&[verb]),
    }
    if !verb.starts_with("cp-") {
        add(rest);
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kubectls_port_is_found_in_its_words() {
        let shown =
            "Forwarding from 127.0.0.1:40123 -> 7000\nForwarding from [::1]:40123 -> 7000\n";
        assert_eq!(local_port(shown), Some(40123));
        assert_eq!(local_port("error: pods \"x\" not found"), None);
    }
}
