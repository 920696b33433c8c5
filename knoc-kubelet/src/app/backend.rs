//! What the kubelet API sees of the rest: pods from the [`Store`], streams from the agent.

use std::sync::Arc;

use futures::{StreamExt as _, future::BoxFuture};
use k8s_openapi::api::core::v1::Pod;
use knoc_proto::pb;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use crate::{
    agent::Agent,
    pods::{Pulse, Store},
    server::{Backend, ByteStream, ExecStream, PodView},
};

/// The API's view of the kubelet.
#[derive(Debug)]
pub(super) struct KubeletBackend {
    store: Store,
    agent: Agent,
    pulse: Pulse,
}

impl KubeletBackend {
    pub(super) fn new(store: Store, agent: Agent, pulse: Pulse) -> Self {
        Self {
            store,
            agent,
            pulse,
        }
    }
}

impl Backend for KubeletBackend {
    fn pods(&self) -> Vec<Arc<Pod>> {
        self.store.pods().into_iter().map(|view| view.pod).collect()
    }

    fn pod(&self, namespace: &str, name: &str) -> Option<PodView> {
        let view = self.store.find(namespace, name)?;
        Some(PodView {
            pod: view.pod,
            observed: view.observed,
        })
    }

    fn read_logs(
        &self,
        request: pb::ReadLogsRequest,
    ) -> BoxFuture<'_, Result<ByteStream, tonic::Status>> {
        Box::pin(async move {
            let answer = self.agent.bulk().read_logs(request).await?;
            let bytes = answer
                .into_inner()
                .map(|chunk| chunk.map(|chunk| chunk.data));
            Ok(bytes.boxed() as ByteStream)
        })
    }

    fn exec(
        &self,
        input: mpsc::Receiver<pb::ExecInput>,
    ) -> BoxFuture<'_, Result<ExecStream, tonic::Status>> {
        Box::pin(async move {
            let answer = self.agent.bulk().exec(ReceiverStream::new(input)).await?;
            Ok(answer.into_inner().boxed() as ExecStream)
        })
    }

    fn sync_loop(&self) -> Result<(), String> {
        self.pulse.check()
    }
}
