//! kubectl as a client: the contract in its words, and its port-forward, which listens here.

use super::target::Target;
use crate::{Forward, Run};

/// Runs `kubectl port-forward` as these words, sends bytes and their end through it, and answers what came back until
/// the other side closed. kubectl would serve on: it is ended.
pub(super) async fn forward(words: &[String], bytes: &[u8]) -> anyhow::Result<Vec<u8>> {
    let run = Run::new(&words[0]).args(&words[1..]);
    Forward::start(run).await?.exchange(bytes).await
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
