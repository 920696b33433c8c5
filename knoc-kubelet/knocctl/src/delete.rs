//! `knocctl delete`: ends pods and deletes their job directories.

use std::process::ExitCode;

use knoc_proto::{
    pb::{self, PodPhase},
    reason::ErrorReason,
};

use super::{
    CtlError, Global, find,
    output::{self, print},
    session::{Session, asked},
    view,
};

#[derive(Debug, clap::Args)]
pub(super) struct Delete {
    /// Name, NAMESPACE/NAME or uid of each pod
    #[arg(required = true)]
    pods: Vec<String>,
    /// Seconds between TERM and KILL [default: the pod's own grace period]
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(i64).range(0..))]
    grace_period: Option<i64>,
    /// The same as --grace-period=1
    #[arg(long, conflicts_with = "grace_period")]
    now: bool,
    /// Does not wait until the pod has ended, and keeps its job directory
    #[arg(long)]
    no_wait: bool,
    /// Keeps the logs and the record of the finished pod
    #[arg(long)]
    keep: bool,
}

impl Delete {
    pub(super) async fn run(self, global: &Global) -> Result<ExitCode, CtlError> {
        let mut session = Session::open(global)?;
        for wanted in &self.pods {
            let pod = find::one(&mut session, global.namespace.as_deref(), wanted).await?;
            self.one(&mut session, &pod).await?;
        }
        Ok(ExitCode::SUCCESS)
    }

    async fn one(&self, session: &mut Session, pod: &pb::PodObserved) -> Result<(), CtlError> {
        let label = format!("{}/{}", pod.namespace, pod.name);
        if pod.phase() != PodPhase::Finished {
            self.end(session, pod, &label).await?;
            if self.no_wait {
                return print(&format!("pod {label} is told to end\n"));
            }
            self.wait(session, pod, &label).await?;
        }
        if self.keep {
            return Ok(());
        }
        if !pod.cluster_id.is_empty() {
            // Its kubelet still has to read the outcome, and removes the job directory afterwards.
            output::complain(&format!(
                "pod {label} belongs to Kubernetes: its job directory stays until its kubelet removes it"
            ));
            return Ok(());
        }
        let request = pb::ForgetPodRequest {
            uid: pod.uid.clone(),
            ..Default::default()
        };
        let what = format!("delete the job directory of pod {label}");
        match asked(&what, session.client.forget_pod(request)).await {
            Err(CtlError::Agent { source, .. })
                if ErrorReason::of(&source) == Some(ErrorReason::NotFound) => {}
            answer => {
                answer?;
            }
        }
        print(&format!("pod {label} deleted\n"))
    }

    async fn end(
        &self,
        session: &mut Session,
        pod: &pb::PodObserved,
        label: &str,
    ) -> Result<(), CtlError> {
        let grace_seconds = if self.now {
            1
        } else {
            self.grace_period.unwrap_or(-1)
        };
        let request = pb::DeletePodRequest {
            cluster_id: pod.cluster_id.clone(),
            uid: pod.uid.clone(),
            grace_seconds,
            reason: "deleted by knocctl".to_owned(),
            ..pb::DeletePodRequest::default()
        };
        let delete = session.client.delete_pod(request);
        asked(&format!("delete pod {label}"), delete).await?;
        Ok(())
    }

    async fn wait(
        &self,
        session: &mut Session,
        pod: &pb::PodObserved,
        label: &str,
    ) -> Result<(), CtlError> {
        let finished = |pod: &pb::PodObserved| pod.phase() == PodPhase::Finished;
        if let Some(pod) = session.wait_for(&pod.uid, finished).await? {
            let outcome = pod.outcome.clone().unwrap_or_default();
            let reason = view::joined(&outcome.reason, &outcome.message);
            output::complain(&format!(
                "pod {label} ended: {}",
                view::joined(view::phase(&pod), &reason)
            ));
        }
        Ok(())
    }
}
