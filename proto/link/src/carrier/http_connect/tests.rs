use std::os::unix::fs::PermissionsExt as _;

use knoc_proto::error::chain;
use tokio::{net::TcpListener, task::JoinSet};

use super::*;

/// A proxy that reads a request's head, sends `answer`, and then echoes.
async fn proxy(answer: Vec<u8>) -> (Proxy, JoinSet<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = format!("http://{}", listener.local_addr().unwrap());
    let mut task = JoinSet::new();
    task.spawn(async move {
        let (mut io, _) = listener.accept().await.unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(io.read_u8().await.unwrap());
        }
        // The client may have seen enough.
        drop(io.write_all(&answer).await);
        let (mut from, mut to) = io.split();
        drop(tokio::io::copy(&mut from, &mut to).await);
        String::from_utf8(head).unwrap()
    });
    (Proxy::of_setting(&at, None).unwrap(), task)
}

async fn refusal(answer: &[u8]) -> String {
    let (proxy, _task) = proxy(answer.to_vec()).await;
    let dialler = Dialler {
        address: "kubelet.example.org:443",
        proxy: &proxy,
    };
    chain(&dialler.dial().await.unwrap_err())
}

#[tokio::test]
async fn what_follows_the_answer_is_the_peers() {
    let (proxy, mut task) = proxy(b"HTTP/1.1 200 OK\r\nX: y\r\n\r\nearly".to_vec()).await;
    let dialler = Dialler {
        address: "[fd00::1]:443",
        proxy: &proxy,
    };
    let mut io = dialler.dial().await.unwrap().io;
    io.write_all(b"hello").await.unwrap();
    let mut came = [0; 10];
    io.read_exact(&mut came).await.unwrap();
    assert_eq!(&came, b"earlyhello");
    drop(io);
    let head = task.join_next().await.unwrap().unwrap();
    assert_eq!(
        head,
        "CONNECT [fd00::1]:443 HTTP/1.1\r\nHost: [fd00::1]:443\r\n\r\n"
    );
}

#[tokio::test]
async fn each_refusal_of_a_proxy_has_its_own_name() {
    for (answer, words) in [
        (
            &b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n"[..],
            "asks for a user",
        ),
        (b"HTTP/1.0 403 Forbidden\r\n\r\n", "has to allow"),
        (b"HTTP/1.1 502 Bad Gateway\r\n\r\n", "502 Bad Gateway"),
        (
            b"SSH-2.0-OpenSSH_9.2\r\n",
            "does not answer like an HTTP proxy",
        ),
        (
            b"HTTP/1.1 nonsense\r\n\r\n",
            "does not answer like an HTTP proxy",
        ),
        (b"HTTP/1.1\r\n\r\n", "does not answer like an HTTP proxy"),
    ] {
        let text = refusal(answer).await;
        assert!(text.contains(words), "{words}: {text}");
    }
    let endless = [b"HTTP/1.1 200 OK\r\n".to_vec(), vec![b'x'; 1 << 20]].concat();
    let text = refusal(&endless).await;
    assert!(text.contains("longer than 8192 bytes"), "{text}");
    let rude = "HTTP/1.1 500 \u{1b}[31mred\u{1b}[0m\r\n\r\n";
    let text = refusal(rude.as_bytes()).await;
    assert!(!text.contains('\u{1b}'), "{text}");
}

#[tokio::test]
async fn a_proxy_that_is_away_or_hangs_up_is_named() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    let proxy = Proxy::of_setting(&at.to_string(), None).unwrap();
    let dialler = Dialler {
        address: "a:1",
        proxy: &proxy,
    };
    let hang_up = async { drop(listener.accept().await.unwrap()) };
    let (refused, ()) = tokio::join!(dialler.dial(), hang_up);
    let text = chain(&refused.unwrap_err());
    assert!(text.contains("before it answered"), "{text}");
    drop(listener);
    let text = chain(&dialler.dial().await.unwrap_err());
    assert!(
        text.contains(&format!("connect to the proxy http://{at}")),
        "{text}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_proxy_that_never_answers_is_named() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap().to_string();
    let proxy = Proxy::of_setting(&at, None).unwrap();
    let dialler = Dialler {
        address: "a:1",
        proxy: &proxy,
    };
    let text = chain(&dialler.dial().await.unwrap_err());
    assert!(text.contains("did not answer within 8 s"), "{text}");
}

#[tokio::test]
async fn credentials_come_from_a_file_that_nobody_else_can_read() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("proxy");
    let set = |text: &str, mode| {
        fs::write(&file, text).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(mode)).unwrap();
    };
    set("ann:secret\n", 0o600);
    let (unknown, mut task) = proxy(b"HTTP/1.1 407 No\r\n\r\n".to_vec()).await;
    let proxy = Proxy::of_setting(&unknown.to_string(), Some(&file)).unwrap();
    let dialler = Dialler {
        address: "a:1",
        proxy: &proxy,
    };
    let text = chain(&dialler.dial().await.unwrap_err());
    assert!(
        text.contains("does not accept the user and password of"),
        "{text}"
    );
    let head = task.join_next().await.unwrap().unwrap();
    assert!(
        head.contains("Proxy-Authorization: Basic YW5uOnNlY3JldA==\r\n"),
        "{head}"
    );
    for (content, mode, words) in [
        ("ann:secret", 0o644, "mode 0644"),
        ("ann", 0o600, "one line"),
        ("ann:a\nX: y", 0o600, "one line"),
        ("", 0o600, "one line"),
    ] {
        set(content, mode);
        let text = chain(&dialler.dial().await.unwrap_err());
        assert!(
            text.contains(words) && !text.contains("secret"),
            "{words}: {text}"
        );
    }
    fs::remove_file(&file).unwrap();
    let text = chain(&dialler.dial().await.unwrap_err());
    assert!(text.contains("read the proxy's credentials"), "{text}");
}
