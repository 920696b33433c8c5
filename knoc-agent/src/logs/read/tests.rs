//! Reading and following a series while it grows and rotates.

use super::*;
use crate::logs::{
    cri::{Cutter, Stream, stamp},
    writer::{Limits, Writer},
};

const DEADLINE: Duration = Duration::from_secs(10);

fn write(writer: &mut Writer, text: &str) {
    let mut out = Vec::new();
    let stamp = stamp(jiff::Timestamp::now());
    let lines = Cutter::new(Stream::Stdout).push(text.as_bytes(), &stamp, &mut out);
    writer.append(&out, lines);
}

async fn collect(live: &Path, options: Options, follow: Option<Follow>) -> String {
    let (output, mut input) = mpsc::channel(CHUNKS);
    let task = read(live.to_owned(), options, follow, output);
    let gather = async {
        let mut all = Vec::new();
        while let Some(chunk) = input.recv().await {
            all.extend_from_slice(&chunk.unwrap().data);
        }
        String::from_utf8(all).unwrap()
    };
    let both = async { tokio::join!(task, gather).1 };
    tokio::time::timeout(DEADLINE, both)
        .await
        .expect("the reader did not end")
}

fn numbered(range: std::ops::Range<u32>) -> String {
    range
        .flat_map(|n| ["line ".to_owned(), n.to_string(), "\n".to_owned()])
        .collect()
}

#[tokio::test]
async fn tails_of_every_length_across_files() {
    let folder = tempfile::tempdir().unwrap();
    let live = folder.path().join("0.log");
    let mut writer = Writer::open(
        &live,
        Limits {
            max_bytes: 400,
            max_files: 20,
        },
    );
    (0..50).for_each(|n| write(&mut writer, &format!("line {n}\n")));
    assert!(series(&live).len() > 3);
    assert_eq!(
        collect(&live, Options::default(), None).await,
        numbered(0..50)
    );
    for n in 0..=60_u32 {
        let options = Options {
            tail_lines: Some(u64::from(n)),
            ..Options::default()
        };
        assert_eq!(
            collect(&live, options, None).await,
            numbered(50_u32.saturating_sub(n)..50)
        );
    }
}

#[tokio::test]
async fn a_tail_longer_than_a_block() {
    let folder = tempfile::tempdir().unwrap();
    let live = folder.path().join("0.log");
    let mut writer = Writer::open(
        &live,
        Limits {
            max_bytes: 1 << 30,
            max_files: 20,
        },
    );
    write(&mut writer, &numbered(0..10_000));
    let options = Options {
        tail_lines: Some(8000),
        ..Options::default()
    };
    assert_eq!(collect(&live, options, None).await, numbered(2000..10_000));
    assert_eq!(
        collect(&live, Options::default(), None).await,
        numbered(0..10_000)
    );
    let empty = folder.path().join("none.log");
    assert_eq!(collect(&empty, Options::default(), None).await, "");
}

#[tokio::test]
async fn a_follower_sees_every_line_across_rotation_and_ends_with_the_instance() {
    for signalled in [true, false] {
        let folder = tempfile::tempdir().unwrap();
        let live = folder.path().join("0.log");
        let (written, seen) = watch::channel(0);
        let (end, ended) = watch::channel(false);
        let follow = Follow {
            written: signalled.then_some(seen),
            ended,
        };
        let reader = collect(&live, Options::default(), Some(follow));
        let path = live.clone();
        let writing = async move {
            let mut writer = Writer::open(
                &path,
                Limits {
                    max_bytes: 500,
                    max_files: 100,
                },
            );
            for n in 0..200 {
                write(&mut writer, &format!("line {n}\n"));
                written.send_modify(|batches| *batches += 1);
                if n % 7 == 0 {
                    tokio::task::yield_now().await;
                }
            }
            end.send_replace(true);
        };
        let (text, ()) = tokio::join!(reader, writing);
        assert_eq!(text, numbered(0..200), "signalled: {signalled}");
    }
}
