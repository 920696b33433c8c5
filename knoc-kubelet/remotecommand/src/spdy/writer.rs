//! The sending direction of a session: writes queued frames to the socket, several at once if several wait.

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering},
};

use bytes::{Bytes, BytesMut};
use tokio::{
    io::{AsyncWrite, AsyncWriteExt as _, WriteHalf},
    sync::mpsc,
};

use super::{
    Activity, SessionError,
    frame::{self, Reset},
    headers::{Deflater, Headers},
};

/// Once this many bytes are encoded, they are written before more frames are taken.
const BATCH: usize = 128 << 10;

/// A frame that is to be written.
#[derive(Debug)]
pub(super) enum Out {
    Reply(u32),
    Reset(u32, Reset),
    Ping(u32),
    Data { id: u32, data: Bytes, fin: bool },
}

/// Writes until no sender is left, then a GOAWAY. The caller must close the socket within a bounded time.
pub(super) async fn run<Io>(
    output: &mut WriteHalf<Io>,
    mut queue: mpsc::Receiver<Out>,
    last: Arc<AtomicU32>,
    activity: Activity,
) -> Result<(), SessionError>
where
    Io: AsyncWrite,
{
    let compressing = |source| SessionError::Headers { source };
    let mut deflater = Deflater::new().map_err(compressing)?;
    let mut wire = BytesMut::new();
    while let Some(first) = queue.recv().await {
        let mut next = Some(first);
        while let Some(out) = next {
            match out {
                Out::Reply(id) => {
                    let block = deflater.block(&Headers::default()).map_err(compressing)?;
                    frame::syn_reply(&mut wire, id, &block);
                }
                Out::Reset(id, status) => frame::reset(&mut wire, id, status),
                Out::Ping(id) => frame::ping(&mut wire, id),
                Out::Data { id, data, fin } => {
                    activity.touch();
                    frame::data(&mut wire, id, &data, fin);
                }
            }
            next = if wire.len() < BATCH {
                queue.try_recv().ok()
            } else {
                None
            };
        }
        write(output, &mut wire).await?;
    }
    frame::go_away(&mut wire, last.load(Ordering::Relaxed));
    write(output, &mut wire).await
}

async fn write<Io>(output: &mut WriteHalf<Io>, wire: &mut BytesMut) -> Result<(), SessionError>
where
    Io: AsyncWrite,
{
    let written = async {
        output.write_all(wire).await?;
        output.flush().await
    };
    written
        .await
        .map_err(|source| SessionError::Write { source })?;
    wire.clear();
    Ok(())
}
