//! The link to the agent, and requests with deadlines. The error of a request names what was requested.

use std::{fmt, future::Future, time::Duration};

use futures::StreamExt as _;
use knoc_link::{Credentials, ExpectPeer, Identity};
use knoc_proto::pb::{self, agent_client::AgentClient, pod_event};
use tonic::{Response, Status, Streaming, transport::Channel};

use super::{
    CtlError, Global,
    config::{self, Context, Surroundings},
};

/// How long one answer may take. Streams have no limit once they have begun.
pub(super) const DEADLINE: Duration = Duration::from_secs(30);

/// A link to one agent.
pub(super) struct Session {
    pub(super) client: AgentClient<Channel>,
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session").finish_non_exhaustive()
    }
}

/// The context that the options choose.
pub(super) fn context(global: &Global) -> Result<Context, CtlError> {
    let here = Surroundings::here();
    Ok(config::load(
        global.config.as_deref(),
        global.context.as_deref(),
        &here,
    )?)
}

/// Loads the certificates of a context, if it has any.
pub(super) fn credentials(context: &Context) -> Result<Option<Credentials>, CtlError> {
    let Some(files) = &context.files else {
        return Ok(None);
    };
    let loaded = Credentials::from_files(&files.ca, &files.cert, &files.key);
    loaded.map(Some).map_err(|source| CtlError::Credentials {
        context: context.name.clone(),
        source,
    })
}

/// The identity that the context expects of the agent.
pub(super) fn expect(context: &Context) -> ExpectPeer {
    match &context.site {
        Some(site) => ExpectPeer::Exactly(Identity::Agent { site: site.clone() }),
        None => ExpectPeer::AnyAgent,
    }
}

impl Session {
    /// Opens the link that the options choose. It connects at the first request.
    pub(super) fn open(global: &Global) -> Result<Self, CtlError> {
        Self::of(&context(global)?)
    }

    pub(super) fn of(context: &Context) -> Result<Self, CtlError> {
        let credentials = credentials(context)?;
        let channel = knoc_link::dial(context.route.clone(), credentials, expect(context))
            .map_err(|source| CtlError::Link { source })?;
        let client = AgentClient::new(channel)
            .max_decoding_message_size(knoc_link::MAX_MESSAGE)
            .max_encoding_message_size(knoc_link::MAX_MESSAGE);
        Ok(Self { client })
    }

    pub(super) async fn info(&mut self) -> Result<pb::AgentInfo, CtlError> {
        let request = pb::GetInfoRequest {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..pb::GetInfoRequest::default()
        };
        asked(
            "ask the agent for its version",
            self.client.get_info(request),
        )
        .await
    }

    /// The pods as they are now.
    pub(super) async fn pods(&mut self) -> Result<Vec<pb::PodObserved>, CtlError> {
        const WHAT: &str = "list the pods";
        let list = async {
            let mut stream = self.watch().await?;
            let mut pods = Vec::new();
            loop {
                match next(WHAT, &mut stream).await?.event {
                    Some(pod_event::Event::Item(pod)) => pods.push(pod),
                    Some(pod_event::Event::Synced(_)) => return Ok(pods),
                    Some(pod_event::Event::RemovedUid(uid)) => pods.retain(|pod| pod.uid != uid),
                    None => {}
                }
            }
        };
        let late = CtlError::Timeout {
            what: WHAT.to_owned(),
            seconds: DEADLINE.as_secs(),
        };
        tokio::time::timeout(DEADLINE, list)
            .await
            .unwrap_or(Err(late))
    }

    pub(super) async fn watch(&mut self) -> Result<Streaming<pb::PodEvent>, CtlError> {
        asked(
            "watch the pods",
            self.client.watch_pods(pb::WatchPodsRequest {}),
        )
        .await
    }

    /// Waits until `wanted` is true for the pod and returns it, or `None` if the pod does not exist any more.
    pub(super) async fn wait_for(
        &mut self,
        uid: &str,
        mut wanted: impl FnMut(&pb::PodObserved) -> bool,
    ) -> Result<Option<pb::PodObserved>, CtlError> {
        let mut stream = self.watch().await?;
        let mut seen = false;
        loop {
            match next("watch the pods", &mut stream).await?.event {
                Some(pod_event::Event::Item(pod)) if pod.uid == uid => {
                    if wanted(&pod) {
                        return Ok(Some(pod));
                    }
                    seen = true;
                }
                Some(pod_event::Event::Synced(_)) if !seen => return Ok(None),
                Some(pod_event::Event::RemovedUid(gone)) if gone == uid => return Ok(None),
                Some(_) | None => {}
            }
        }
    }
}

/// Waits for the answer to one request, at most [`DEADLINE`].
pub(super) async fn asked<T>(
    what: &str,
    request: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<T, CtlError> {
    match tokio::time::timeout(DEADLINE, request).await {
        Ok(Ok(response)) => Ok(response.into_inner()),
        Ok(Err(source)) => Err(CtlError::Agent {
            what: what.to_owned(),
            source,
        }),
        Err(_) => Err(CtlError::Timeout {
            what: what.to_owned(),
            seconds: DEADLINE.as_secs(),
        }),
    }
}

/// The next message of a stream; the end of the stream is an error.
pub(super) async fn next<T>(what: &str, stream: &mut Streaming<T>) -> Result<T, CtlError> {
    match stream.next().await {
        Some(Ok(message)) => Ok(message),
        Some(Err(source)) => Err(CtlError::Agent {
            what: what.to_owned(),
            source,
        }),
        None => Err(CtlError::CutShort {
            what: what.to_owned(),
        }),
    }
}
