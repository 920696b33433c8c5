use knoc_proto::error::chain;

use super::*;

fn argv(text: &str) -> Result<Argv, String> {
    text.parse::<Argv>().map_err(|error| error.to_string())
}

#[test]
fn plain_words_are_split_and_all_else_is_a_list() {
    for (text, words, shown) in [
        ("ssh -J jump login knoc-agent connect", 6, None),
        ("  ssh   login  ", 2, Some("ssh login")),
        (r#"["ssh","a b","$(x)"]"#, 3, None),
        (r#"["ssh", "login"]"#, 2, Some("ssh login")),
    ] {
        let argv = argv(text).unwrap();
        assert_eq!(argv.words().len(), words, "{text}");
        assert_eq!(argv.to_string(), shown.unwrap_or(text));
        assert_eq!(argv.to_string().parse::<Argv>().unwrap(), argv);
    }
    for (text, said) in [
        ("", "no program"),
        ("[]", "no program"),
        ("[\"ssh\", 1]", "JSON list of strings"),
        ("ssh login 'knoc-agent connect'", "as a list"),
        ("ssh login $HOME/knoc-agent connect", "as a list"),
        ("~/bin/ssh login", "as a list"),
        ("[\"a\\u0000b\"]", "NUL"),
    ] {
        let error = argv(text).unwrap_err();
        assert!(error.contains(said), "{text}: {error}");
    }
    assert!(argv(&"x ".repeat(65)).unwrap_err().contains("64 words"));
}

async fn dial(script: &str, speaks: Speaks) -> Result<Unverified<CommandIo>, LinkError> {
    let words = ["/bin/sh", "-c", script].map(str::to_owned);
    let argv = Argv::new(words.into()).unwrap();
    let carrier = Carrier::Exec(argv.clone());
    let dialler = Dialler {
        argv: &argv,
        carrier: &carrier,
        speaks,
    };
    dialler.dial().await
}

async fn cause(script: &str) -> (Cause, String) {
    let error = dial(script, Speaks::Tls).await.unwrap_err();
    let text = chain(&error);
    let LinkError::Command { source, .. } = error else {
        panic!("{error}");
    };
    (source.cause, text)
}

#[tokio::test]
async fn bytes_go_both_ways_behind_a_banner() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let script = "echo Welcome; printf 'KNOC-LINK/1 tls\\nfirst'; cat; echo last";
    let mut io = dial(script, Speaks::Tls).await.unwrap().io;
    let sent = vec![7; 1 << 20];
    let (mut reader, mut writer) = tokio::io::split(&mut io);
    let mut read = Vec::new();
    let write = async {
        writer.write_all(&sent).await?;
        writer.shutdown().await
    };
    let (written, received) = tokio::join!(write, reader.read_to_end(&mut read));
    written.unwrap();
    received.unwrap();
    assert_eq!(&read[..5], b"first");
    assert_eq!(&read[5..5 + sent.len()], &sent);
    assert_eq!(&read[5 + sent.len()..], b"last\n");
}

#[tokio::test]
async fn a_command_that_gives_no_link_says_why() {
    let denied = "echo Welcome; echo 'u@h: Permission denied (publickey).' >&2; exit 255";
    let (found, text) = cause(denied).await;
    assert_eq!(found, Cause::KeyRefused, "{text}");
    assert!(
        text.contains("Permission denied") && text.contains("authorized_keys"),
        "{text}"
    );
    let (found, text) = cause("echo '-sh: knoc-agent: not found' >&2; exit 127").await;
    assert_eq!(found, Cause::NoAgentProgram, "{text}");
    // An older agent, or another program.
    let (found, text) = cause("echo hello").await;
    assert_eq!(found, Cause::NoMarker, "{text}");
    let (found, text) = cause("yes; true").await;
    assert_eq!(found, Cause::NoMarker, "{text}");
    assert!(text.contains("64 KiB"), "{text}");
    let (found, text) = cause("printf 'KNOC-LINK/1 plain\\n'; cat").await;
    assert_eq!(found, Cause::OtherSpeech(Speaks::Plain), "{text}");
    let argv = Argv::new(vec!["/nowhere/ssh".into()]).unwrap();
    let carrier = Carrier::Exec(argv.clone());
    let dialler = Dialler {
        argv: &argv,
        carrier: &carrier,
        speaks: Speaks::Tls,
    };
    let text = chain(&dialler.dial().await.unwrap_err());
    assert!(
        text.contains("not on this host") && text.contains("-ssh"),
        "{text}"
    );
}

#[tokio::test]
async fn the_end_of_a_link_has_the_commands_own_words_as_its_cause() {
    use tokio::io::AsyncReadExt as _;
    let script =
        "printf 'KNOC-LINK/1 tls\\n'; echo 'Timeout, server login not responding.' >&2; exit 255";
    let mut io = dial(script, Speaks::Tls).await.unwrap().io;
    let error = io.read_to_end(&mut Vec::new()).await.unwrap_err();
    assert!(
        error.to_string().contains("login not responding"),
        "{error}"
    );
}

#[tokio::test]
async fn stderr_is_bounded_and_never_holds_up_the_stream() {
    use tokio::io::AsyncReadExt as _;
    let script = "printf 'KNOC-LINK/1 tls\\n'; head -c 1000000 /dev/zero | tr '\\0' x >&2; echo done; exit 3";
    let mut io = dial(script, Speaks::Tls).await.unwrap().io;
    let mut read = Vec::new();
    let error = io.read_to_end(&mut read).await.unwrap_err();
    assert_eq!(read, b"done\n");
    assert!(
        error.to_string().len() < 6000,
        "{}",
        error.to_string().len()
    );
}

#[tokio::test]
async fn a_command_and_its_children_end_with_the_connection() {
    use tokio::io::AsyncReadExt as _;
    let script = "sleep 1000 & printf 'KNOC-LINK/1 tls\\n'; echo $!; wait";
    let mut io = dial(script, Speaks::Tls).await.unwrap().io;
    let mut line = Vec::new();
    while !line.ends_with(b"\n") {
        line.push(io.read_u8().await.unwrap());
    }
    let child: i32 = String::from_utf8(line).unwrap().trim().parse().unwrap();
    let lives = || {
        let stat = std::fs::read_to_string(format!("/proc/{child}/stat")).unwrap_or_default();
        !stat.is_empty() && !stat.contains(") Z ")
    };
    assert!(lives());
    drop(io);
    let gone = tokio::time::timeout(Duration::from_secs(10), async {
        while lives() {
            tokio::task::yield_now().await;
        }
    });
    gone.await.unwrap();
}
