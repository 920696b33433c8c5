//! A SPDY client for tests, which writes and reads frames one by one.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::missing_panics_doc,
    reason = "for tests only: any error fails the test"
)]

use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

pub use super::frame::Frame;
use super::frame::{self, Decoder};
use super::headers::{Deflater, Headers};

/// How long [`Peer::next`] waits for a frame.
const PATIENCE: Duration = Duration::from_secs(20);

/// A client that writes and reads single frames.
#[derive(Debug)]
pub struct Peer<Io> {
    pub(super) io: Io,
    deflater: Deflater,
    decoder: Decoder,
    buffer: BytesMut,
    /// How long [`Peer::next`] waits.
    pub patience: Duration,
}

impl<Io: AsyncRead + AsyncWrite + Unpin> Peer<Io> {
    /// Creates a client on a connection that has been upgraded.
    pub fn new(io: Io) -> Self {
        Self {
            io,
            deflater: Deflater::new().unwrap(),
            decoder: Decoder::default(),
            buffer: BytesMut::new(),
            patience: PATIENCE,
        }
    }

    pub(super) async fn write(&mut self, wire: &[u8]) {
        self.io.write_all(wire).await.unwrap();
    }

    pub(super) fn opening(&mut self, id: u32, pairs: &[(&str, &str)]) -> BytesMut {
        let own = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        let headers = Headers(pairs.iter().map(own).collect());
        let block = self.deflater.block(&headers).unwrap();
        let mut wire = BytesMut::new();
        frame::syn_stream(&mut wire, id, &block);
        wire
    }

    /// Opens a stream with these headers.
    pub async fn open(&mut self, id: u32, pairs: &[(&str, &str)]) {
        let wire = self.opening(id, pairs);
        self.write(&wire).await;
    }

    /// Sends bytes on a stream.
    pub async fn data(&mut self, id: u32, bytes: &[u8], fin: bool) {
        let mut wire = BytesMut::new();
        frame::data(&mut wire, id, bytes, fin);
        self.write(&wire).await;
    }

    /// Sends a ping.
    pub async fn ping(&mut self, id: u32) {
        let mut wire = BytesMut::new();
        frame::ping(&mut wire, id);
        self.write(&wire).await;
    }

    /// Resets a stream.
    pub async fn reset(&mut self, id: u32) {
        let mut wire = BytesMut::new();
        frame::reset(&mut wire, id, frame::Reset::Refused);
        self.write(&wire).await;
    }

    /// Sends a GOAWAY: it opens no more streams.
    pub async fn go_away(&mut self) {
        let mut wire = BytesMut::new();
        frame::go_away(&mut wire, 0);
        self.write(&wire).await;
    }

    /// The next frame; `None` once the session has closed. Panics if none arrives in time.
    pub async fn next(&mut self) -> Option<Frame> {
        let read = async {
            loop {
                if let Some(frame) = self.decoder.decode(&mut self.buffer).unwrap() {
                    return Some(frame);
                }
                // A connection that is cut has no TLS close message.
                if self.io.read_buf(&mut self.buffer).await.unwrap_or(0) == 0 {
                    return None;
                }
            }
        };
        tokio::time::timeout(self.patience, read)
            .await
            .expect("no frame")
    }
}
