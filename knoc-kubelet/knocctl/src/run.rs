//! `knocctl run`: runs a pod from a Kubernetes manifest, without Kubernetes.

use std::{
    io::Read as _,
    path::{Path, PathBuf},
    process::ExitCode,
};

use knoc_proto::pb::{self, PodPhase};
use serde_json::json;

use super::{
    CtlError, Global,
    logs::Follow,
    manifest::{self, Given, Manifest},
    output,
    session::{Session, asked},
    view,
};

#[derive(Debug, clap::Args)]
pub(super) struct Run {
    /// The pod's manifest; `-` reads standard input
    #[arg(short, long, value_name = "FILE")]
    file: PathBuf,
    /// The pod's name, instead of the one in the manifest
    #[arg(long)]
    name: Option<String>,
    /// The pod's uid, instead of a random one; running the same uid and manifest again changes nothing
    #[arg(long)]
    uid: Option<String>,
    /// Waits until the pod has ended; exits with the exit code of the first container that failed
    #[arg(long)]
    wait: bool,
    /// Prints the log of the first container until the pod has ended
    #[arg(long)]
    logs: bool,
}

impl Run {
    pub(super) async fn run(self, global: &Global) -> Result<ExitCode, CtlError> {
        let (name, uid) = (self.name.as_deref(), self.uid.as_deref());
        let manifest = manifest(&self.file, global.namespace.as_deref(), name, uid)?;
        for mapped in &manifest.mapped {
            output::complain(&format!("note: {mapped}"));
        }
        let mut session = Session::open(global)?;
        refuse_twins(&mut session, &manifest.spec).await?;
        let label = format!("{}/{}", manifest.spec.namespace, manifest.spec.name);
        let first = manifest
            .spec
            .containers
            .first()
            .map(|container| container.name.clone());
        let uid = manifest.spec.uid.clone();
        let request = pb::EnsurePodRequest {
            spec: Some(manifest.spec),
            values: Some(manifest.values),
            ..pb::EnsurePodRequest::default()
        };
        let ensure = Box::pin(session.client.ensure_pod(request));
        let answer = asked(&format!("run pod {label}"), ensure).await?;
        let state = if answer.created {
            "accepted"
        } else {
            "was there already"
        };
        if !(self.wait || self.logs) {
            let value = || json!({"uid": uid, "created": answer.created});
            output::show(global.output, value, |_| {
                format!("pod {label} {state} (uid {uid})\n")
            })?;
            return Ok(ExitCode::SUCCESS);
        }
        output::complain(&format!("pod {label} {state} (uid {uid})"));
        if self.logs {
            let follow = Follow {
                uid: &uid,
                container: first.as_deref().unwrap_or_default(),
            };
            follow.until_the_end(&mut session).await?;
        }
        wait(&mut session, &uid).await
    }
}

/// Rejects a second pod of the same name, because commands could not tell the two apart by name.
async fn refuse_twins(session: &mut Session, spec: &pb::PodSpec) -> Result<(), CtlError> {
    let twin = session.pods().await?.into_iter().find(|pod| {
        pod.uid != spec.uid && pod.namespace == spec.namespace && pod.name == spec.name
    });
    match twin {
        None => Ok(()),
        Some(pod) => {
            let name = format!("{}/{}", pod.namespace, pod.name);
            Err(CtlError::Exists { name, uid: pod.uid })
        }
    }
}

/// Waits for the end of the pod and prints each change of its phase. Returns the pod's exit code.
async fn wait(session: &mut Session, uid: &str) -> Result<ExitCode, CtlError> {
    let mut last = String::new();
    let ended = session
        .wait_for(uid, |pod| {
            let line = view::joined(view::phase(pod), &view::joined(&pod.reason, &pod.message));
            if line != last {
                output::complain(&line);
                last = line;
            }
            pod.phase() == PodPhase::Finished
        })
        .await?;
    let Some(pod) = ended else {
        return Err(CtlError::NoPod {
            wanted: uid.to_owned(),
        });
    };
    let outcome = pod.outcome.clone().unwrap_or_default();
    let reason = view::joined(&outcome.reason, &outcome.message);
    if !reason.is_empty() {
        output::complain(&reason);
    }
    Ok(ExitCode::from(code(&pod)))
}

/// The pod's exit code: 0 if it succeeded, else that of the first failed container, else that of the first failed init
/// container (a sidecar that was stopped counts as failed, but never alone), else 1.
fn code(pod: &pb::PodObserved) -> u8 {
    if view::outcome(pod) == Some("Succeeded") {
        return 0;
    }
    let codes = pod
        .containers
        .iter()
        .chain(&pod.init_containers)
        .filter_map(|container| {
            let Some(pb::container_status::State::Terminated(ended)) = &container.state else {
                return None;
            };
            u8::try_from(ended.exit_code).ok().filter(|code| *code != 0)
        });
    codes.take(1).next().unwrap_or(1)
}

/// Reads and translates a manifest.
pub(super) fn manifest(
    path: &Path,
    namespace: Option<&str>,
    name: Option<&str>,
    uid: Option<&str>,
) -> Result<Manifest, CtlError> {
    let read = |source| CtlError::Read {
        path: path.to_owned(),
        source,
    };
    let text = if path == Path::new("-") {
        let mut text = String::new();
        std::io::stdin()
            .lock()
            .read_to_string(&mut text)
            .map_err(read)?;
        text
    } else {
        std::fs::read_to_string(path).map_err(read)?
    };
    let random = random();
    let given = Given {
        namespace,
        name,
        uid,
        random: &random,
    };
    Ok(manifest::parse(&text, path, &given)?)
}

/// Sixteen random letters and digits: 80 bits.
fn random() -> String {
    const LETTERS: &[u8; 32] = b"abcdefghijkmnpqrstuvwxyz23456789";
    let bytes: [u8; 16] = rand::random();
    bytes
        .iter()
        .map(|byte| char::from(LETTERS[usize::from(byte % 32)]))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_names_differ() {
        let (one, two) = (random(), random());
        assert_eq!(one.len(), 16);
        assert_ne!(one, two);
    }

    #[test]
    fn the_exit_code_is_the_first_failure() {
        let mut pod = view::tests::sample();
        assert_eq!(code(&pod), 137);
        pod.containers.truncate(1);
        assert_eq!(code(&pod), 1);
        let kind = pb::OutcomeKind::Succeeded.into();
        pod.outcome = Some(pb::Outcome {
            kind,
            ..pb::Outcome::default()
        });
        assert_eq!(code(&pod), 0);
    }
}
