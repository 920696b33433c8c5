//! kubectl as a client: its arguments for each verb of the contract, and its port-forward, which listens on this host.

use super::target::Target;
use crate::{Forward, Run};

/// Runs `kubectl port-forward` with these arguments, sends bytes and their end through it, and returns what came back until
/// the other side closed. kubectl would continue to serve, so it is stopped.
pub(super) async fn forward(command: &[String], bytes: &[u8]) -> anyhow::Result<Vec<u8>> {
    let run = Run::new(&command[0]).args(&command[1..]);
    Forward::start(run).await?.exchange(bytes).await
}

/// kubectl's arguments for a verb of the contract.
pub(super) fn arguments(verb: &str, target: Target<'_>, rest: &[&str]) -> Vec<String> {
    let Target {
        namespace,
        pod,
        container,
    } = target;
    let cp = ["cp", "--retries=0", "-c", container];
    let remote = |folder: &str, name: &str| format!("{pod}:{folder}/{name}");
    let mut arguments: Vec<String> = vec!["--namespace".into(), namespace.into()];
    let mut add = |more: &[&str]| arguments.extend(more.iter().map(|&word| word.into()));
    match (verb, rest) {
        ("exec", _) => add(&["exec", pod, "-c", container, "--"]),
        ("exec-stdin", _) => add(&["exec", "-i", pod, "-c", container, "--"]),
        ("exec-tty", _) => add(&["exec", "-it", pod, "-c", container, "--"]),
        ("attach", _) => add(&["attach", "-i", pod, "-c", container]),
        ("port-forward", _) => add(&["port-forward", pod]),
        ("logs", _) => add(&["logs", "-f", pod, "-c", container]),
        ("cp-to", [local, folder, name]) => {
            let local = format!("{local}/{name}");
            add(&cp);
            add(&[&local, &remote(folder, name)]);
        }
        ("cp-from", [folder, local, name]) => {
            let local = format!("{local}/{name}");
            add(&cp);
            add(&[&remote(folder, name), &local]);
        }
        _ => add(&[verb]),
    }
    if !verb.starts_with("cp-") {
        add(rest);
    }
    arguments
}
