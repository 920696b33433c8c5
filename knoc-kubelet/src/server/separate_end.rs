//! Sends the end of a chunked answer in a TLS record of its own.
//!
//! The API server copies a container's log into a WebSocket with a loop that discards the bytes of a read that also
//! returns the end of the body (`messageCopy` in `k8s.io/streaming/pkg/httpstream/wsstream`). Go's HTTP client returns
//! both in one read if the last bytes and the terminating chunk are in one TLS record: a short log then arrives empty,
//! and a long one without its last 2 KiB. A kubelet written in Go writes the terminating chunk separately; hyper writes
//! everything it has at once. [`SeparateEnd`] sits between hyper and TLS and never passes the terminating chunk on
//! together with the bytes before it. Every write becomes at least one record, and Go's TLS reads one record at a time.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// The terminating chunk. It has no trailers, since we send none.
const END: &[u8] = b"0\r\n\r\n";

/// A connection that passes a terminating chunk on alone. Bytes of a body that look like one are only written
/// separately too, which does no harm.
#[derive(Debug)]
pub(super) struct SeparateEnd<T>(pub(super) T);

/// How many bytes of `buf` to write first: all except a terminating chunk at its end.
fn before_end(buf: &[u8]) -> usize {
    match buf.strip_suffix(END) {
        Some(before) if !before.is_empty() => before.len(),
        _ => buf.len(),
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for SeparateEnd<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let first = before_end(buf);
        Pin::new(&mut self.0).poll_write(cx, &buf[..first])
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let used = bufs
            .iter()
            .rposition(|buf| !buf.is_empty())
            .map_or(0, |last| last + 1);
        let Some((last, before)) = bufs[..used].split_last() else {
            return Poll::Ready(Ok(0));
        };
        if before.iter().all(|buf| buf.is_empty()) {
            return self.poll_write(cx, last);
        }
        // The rest of a slice that is cut is written by the next call.
        let first = if last.ends_with(END) {
            before
        } else {
            &bufs[..used]
        };
        Pin::new(&mut self.0).poll_write_vectored(cx, first)
    }

    fn is_write_vectored(&self) -> bool {
        self.0.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for SeparateEnd<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::sync::{Arc, Mutex};

    use axum::body::Body;
    use bytes::Bytes;
    use futures::{StreamExt as _, stream};
    use hyper::service::service_fn;
    use hyper_util::rt::TokioIo;
    use tokio::io::AsyncWriteExt as _;

    use super::*;

    /// A connection that takes at most `most` bytes at once, returns `input`, and records every write.
    struct Recorder {
        input: &'static [u8],
        writes: Arc<Mutex<Vec<Vec<u8>>>>,
        most: usize,
        vectored: bool,
    }

    impl AsyncRead for Recorder {
        fn poll_read(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            buf: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            // Then nothing more comes, and the connection stays open.
            match std::mem::take(&mut self.input) {
                [] => Poll::Pending,
                input => {
                    buf.put_slice(input);
                    Poll::Ready(Ok(()))
                }
            }
        }
    }

    impl AsyncWrite for Recorder {
        fn poll_write(
            self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            buf: &[u8],
        ) -> Poll<io::Result<usize>> {
            self.poll_write_vectored(cx, &[IoSlice::new(buf)])
        }

        fn poll_write_vectored(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
            bufs: &[IoSlice<'_>],
        ) -> Poll<io::Result<usize>> {
            let all: Vec<u8> = bufs.iter().flat_map(|buf| buf.iter().copied()).collect();
            let taken = &all[..all.len().min(self.most)];
            self.writes.lock().unwrap().push(taken.to_vec());
            Poll::Ready(Ok(taken.len()))
        }

        fn is_write_vectored(&self) -> bool {
            self.vectored
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    /// The writes of hyper for an answer with these chunks.
    async fn answer(chunks: &'static [&'static str], most: usize, vectored: bool) -> Vec<Vec<u8>> {
        let writes = Arc::default();
        let io = Recorder {
            input: b"GET / HTTP/1.1\r\nhost: k\r\nconnection: close\r\n\r\n",
            writes: Arc::clone(&writes),
            most,
            vectored,
        };
        let service = service_fn(move |_| async move {
            let chunks = stream::iter(chunks).map(|chunk| Ok::<_, Infallible>(Bytes::from(*chunk)));
            Ok::<_, Infallible>(http::Response::new(Body::from_stream(chunks)))
        });
        hyper::server::conn::http1::Builder::new()
            .serve_connection(TokioIo::new(SeparateEnd(io)), service)
            .await
            .unwrap();
        let writes = writes.lock().unwrap();
        writes.clone()
    }

    #[tokio::test]
    async fn the_end_of_an_answer_is_a_write_of_its_own() {
        let cases: [&[&str]; 6] = [
            &[],
            &["x"],
            &["one\n", "two\n"],
            &["ends like a chunk\r\n0\r\n\r\n"],
            &["0\r\n\r\n", "0\r\n\r\n"],
            &["0\r\n\r\n"],
        ];
        for chunks in cases {
            for most in [1, 4, 5, 7, 100_000] {
                for vectored in [true, false] {
                    let writes = answer(chunks, most, vectored).await;
                    let context = format!("{chunks:?} by {most}, vectored: {vectored}: {writes:?}");
                    let all = writes.concat();
                    let text = String::from_utf8(all).unwrap();
                    let body = text.split_once("\r\n\r\n").unwrap().1;
                    let expected: String = chunks
                        .iter()
                        .map(|chunk| format!("{:X}\r\n{chunk}\r\n", chunk.len()))
                        .chain(["0\r\n\r\n".to_owned()])
                        .collect();
                    assert_eq!(body, expected, "{context}");
                    // The write in which the terminating chunk begins.
                    let mut end = 0;
                    let starts = writes.iter().any(|write| {
                        let start = end;
                        end += write.len();
                        start == text.len() - END.len()
                    });
                    assert!(starts, "{context}");
                }
            }
        }
    }

    #[tokio::test]
    async fn other_bytes_pass_as_they_are() {
        let writes = Arc::default();
        let io = Recorder {
            input: b"",
            writes: Arc::clone(&writes),
            most: 1000,
            vectored: true,
        };
        let mut connection = SeparateEnd(io);
        let bufs = [
            IoSlice::new(b"a"),
            IoSlice::new(b""),
            IoSlice::new(b"b"),
            IoSlice::new(b""),
        ];
        assert_eq!(connection.write_vectored(&bufs).await.unwrap(), 2);
        assert_eq!(connection.write_vectored(&[]).await.unwrap(), 0);
        assert_eq!(connection.write(END).await.unwrap(), END.len());
        let writes = writes.lock().unwrap();
        assert_eq!(*writes, [b"ab".to_vec(), END.to_vec()]);
    }
}
