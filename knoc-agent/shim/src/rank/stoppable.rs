//! The program of the rank from its start to its end: it gets what the shim orders.

use std::sync::Arc;

use knoc_proto::pb::{self, from_rank};
use rustix::process::Signal;
use tokio::{
    io::AsyncWrite,
    sync::{mpsc, oneshot},
};
use tokio_util::sync::CancellationToken;

use super::{
    super::{
        container::{Ended, Program},
        pod::Pod,
    },
    Order, say,
    streams::Streams,
};

/// The program, as far as it runs.
pub(super) struct Stoppable {
    program: Option<Arc<Program>>,
    abort: CancellationToken,
}

impl Stoppable {
    /// A program that does not run yet; `abort` ends its start.
    pub(super) fn new(abort: CancellationToken) -> Self {
        Self {
            program: None,
            abort,
        }
    }

    /// Does what the shim orders, and tells it that the program runs, until the program has ended.
    pub(super) async fn until_end(
        mut self,
        running: impl Future<Output = Ended>,
        (mut runs, mut orders): (oneshot::Receiver<Arc<Program>>, mpsc::Receiver<Order>),
        (pod, streams, writer): (&Arc<Pod>, &mut Streams, &mut (impl AsyncWrite + Unpin)),
    ) -> Ended {
        tokio::pin!(running);
        let mut connected = true;
        loop {
            tokio::select! {
                biased;
                ended = &mut running => return ended,
                order = orders.recv(), if connected => {
                    connected = order.is_some();
                    self.obey(order, streams, pod);
                }
                Ok(program) = &mut runs, if self.program.is_none() => {
                    let running = pb::RankRunning {
                        pid: program.identity.pid,
                        shares_processes: program.beside.is_some(),
                    };
                    self.program = Some(program);
                    // If it is lost, `orders` ends.
                    say(writer, from_rank::Message::Running(running)).await.ok();
                }
                () = streams.next_end() => {}
            }
        }
    }

    /// Does what the shim orders. If there is no order, the connection is lost, and the program is killed.
    fn obey(&self, order: Option<Order>, streams: &mut Streams, pod: &Arc<Pod>) {
        match order {
            Some(Order::Signal(signal)) => self.take(signal),
            Some(Order::OpenStream(id)) => streams.open(id, pod, self.program.as_ref()),
            Some(Order::EndStream(id)) => streams.end(id),
            None => self.take(Signal::KILL),
        }
    }

    fn take(&self, signal: Signal) {
        match &self.program {
            Some(program) if signal == Signal::KILL => {
                program.kill();
                self.abort.cancel();
            }
            Some(program) => program.signal(signal),
            // The program does not run yet: there is nothing that could take the signal.
            None => self.abort.cancel(),
        }
    }
}
