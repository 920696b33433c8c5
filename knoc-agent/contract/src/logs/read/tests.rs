//! Tests of reading and following a series while it grows and rotates.

use std::fs::{self, File};

use super::*;
use crate::logs::{
    cri::{Cutter, Stream, stamp},
    rotated, series,
    writer::{Limits, Writer, forget_older},
};

const DEADLINE: Duration = Duration::from_mins(1);

fn writer(live: &Path, max_bytes: u64, max_files: u32) -> Writer {
    let limits = Limits {
        max_bytes,
        max_files,
        max_total: 1 << 30,
    };
    Writer::open(live, limits)
}

fn write(writer: &mut Writer, text: &str) {
    let mut out = Vec::new();
    let stamp = stamp(jiff::Timestamp::now());
    let lines = Cutter::new(Stream::Stdout).push(text.as_bytes(), &stamp, &mut out);
    writer.append(&out, lines);
}

fn whole(live: &Path) -> Series {
    Series {
        live: live.to_owned(),
        attempt: 0,
    }
}

async fn collect(live: &Path, options: Options, follow: Option<Follow>) -> String {
    let (output, mut input) = mpsc::channel(CHUNKS);
    let task = read(whole(live), options, follow, output);
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
    let mut writer = writer(&live, 400, 20);
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
    let mut writer = writer(&live, 1 << 30, 20);
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
            let mut writer = writer(&path, 500, 100);
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

/// All chunks of a finished series.
async fn chunks(live: &Path, options: Options) -> Vec<pb::LogChunk> {
    let (output, mut input) = mpsc::channel(CHUNKS);
    let gather = async {
        let mut all: Vec<pb::LogChunk> = Vec::new();
        while let Some(chunk) = input.recv().await {
            all.push(Result::unwrap(chunk));
        }
        all
    };
    tokio::join!(read(whole(live), options, None, output), gather).1
}

fn text(chunks: &[pb::LogChunk]) -> String {
    let bytes: Vec<u8> = chunks.iter().flat_map(|chunk| chunk.data.clone()).collect();
    String::from_utf8(bytes).unwrap()
}

fn varied() -> [Options; 5] {
    let all = Options::default();
    let tail = Some(30_000);
    [
        all.clone(),
        Options {
            tail_lines: tail,
            ..all.clone()
        },
        Options {
            timestamps: true,
            ..all.clone()
        },
        Options {
            stream: Some(Stream::Stderr),
            ..all.clone()
        },
        Options {
            limit_bytes: Some(1_000_000),
            timestamps: true,
            ..all
        },
    ]
}

/// Writes both streams, long lines in pieces and many files; each batch has a time of its own.
fn fill(live: &Path) -> Writer {
    let mut writer = writer(live, 300_000, 100);
    let mut cutters = [Cutter::new(Stream::Stdout), Cutter::new(Stream::Stderr)];
    for n in 0..3000_i64 {
        let at = jiff::Timestamp::from_microsecond(1_795_370_516_000_000 + n).unwrap();
        let text = if n % 100 == 0 {
            "x".repeat(40_000)
        } else {
            numbered(0..u32::try_from(n % 20).unwrap())
        };
        let mut out = Vec::new();
        let cutter = &mut cutters[usize::from(n % 3 == 0)];
        let lines = cutter.push(text.as_bytes(), &stamp(at), &mut out);
        writer.append(&out, lines);
    }
    writer
}

#[tokio::test]
async fn another_reader_goes_on_at_any_chunk_with_nothing_lost_and_nothing_twice() {
    let folder = tempfile::tempdir().unwrap();
    let live = folder.path().join("0.log");
    fill(&live);
    assert!(series(&live).len() > 3);
    for options in varied() {
        let all = chunks(&live, options.clone()).await;
        let (last, before) = all.split_last().unwrap();
        assert!(last.end && before.iter().all(|chunk| !chunk.end));
        for (index, chunk) in all.iter().enumerate() {
            let sent = text(&all[..=index]);
            let limit = options.limit_bytes.map(|limit| limit - sent.len() as u64);
            if limit == Some(0) {
                continue;
            }
            let rest = Options {
                from: Some(chunk.next.as_ref().unwrap().into()),
                limit_bytes: limit,
                ..options.clone()
            };
            let rest = text(&chunks(&live, rest).await);
            assert!(
                sent + &rest == text(&all),
                "{options:?} after chunk {index}"
            );
        }
    }
}

/// Of a reader of the last lines, or of none: what is written after the first position is new to it, and nothing else is.
#[tokio::test]
async fn the_first_position_comes_before_the_first_line() {
    for written in [0, 20] {
        let folder = tempfile::tempdir().unwrap();
        let live = folder.path().join("0.log");
        let mut log = None;
        if written > 0 {
            write(log.insert(writer(&live, 1 << 20, 3)), &numbered(0..written));
        }
        let options = Options {
            tail_lines: Some(0),
            positions: true,
            ..Options::default()
        };
        let silent = chunks(&live, options.clone()).await;
        let first = silent.first().unwrap();
        assert!(first.data.is_empty() && !first.end, "{first:?}");
        assert_eq!(text(&silent), "");
        let more = numbered(written..written + 5);
        write(log.get_or_insert_with(|| writer(&live, 1 << 20, 3)), &more);
        let rest = Options {
            from: first.next.as_ref().map(Into::into),
            ..options
        };
        assert_eq!(text(&chunks(&live, rest).await), more, "{written} before");
    }
}

#[tokio::test]
async fn only_newer_lines_follow_if_the_file_was_dropped() {
    let folder = tempfile::tempdir().unwrap();
    let live = folder.path().join("0.log");
    fill(&live);
    let all = chunks(&live, Options::default()).await;
    let next = all.first().and_then(|chunk| chunk.next.as_ref()).unwrap();
    let files = series(&live);
    std::fs::remove_file(&files[0]).unwrap();
    let rest = |from: &pb::LogPosition| {
        let from = Some(from.into());
        chunks(
            &live,
            Options {
                from,
                ..Options::default()
            },
        )
    };
    let left = text(&chunks(&live, Options::default()).await);
    assert!(text(&rest(next).await) == left, "all that is left is newer");
    // A file that this host does not see yet: everything that it does see is older, and was sent.
    let unseen = pb::LogPosition {
        inode: u64::MAX,
        ..all.last().and_then(|chunk| chunk.next.clone()).unwrap()
    };
    assert_eq!(text(&rest(&unseen).await), "");
}

#[test]
fn a_rotation_between_looking_and_opening_gives_no_other_file() {
    let folder = tempfile::tempdir().unwrap();
    let live = folder.path().join("0.log");
    for (path, text) in [(rotated(&live, 1), "older"), (live.clone(), "newer")] {
        io::Write::write_all(&mut File::create(path).unwrap(), text.as_bytes()).unwrap();
    }
    let rotations = std::cell::Cell::new(0);
    let opened = open(&live, |files| {
        let wanted = Identity::of(&fs::metadata(rotated(&live, rotations.get() + 1)).unwrap());
        // By the time that the chosen name is opened it belongs to the newer file.
        if rotations.replace(1) == 0 {
            fs::rename(rotated(&live, 1), rotated(&live, 2)).unwrap();
            fs::rename(&live, rotated(&live, 1)).unwrap();
        }
        files.iter().position(|file| *file == wanted).unwrap()
    });
    let text = io::read_to_string(opened.unwrap().unwrap().file).unwrap();
    assert_eq!(text, "older");
}

/// Each chunk is one frame of the link and fills whole TLS records, whatever the length of the
/// lines.
#[tokio::test]
async fn a_long_log_comes_in_pieces_of_one_message() {
    use prost::Message as _;
    for width in [29, 79, 500, 10_000] {
        let folder = tempfile::tempdir().unwrap();
        let live = folder.path().join("0.log");
        let mut writer = writer(&live, 1 << 30, 1);
        let all = ("x".repeat(width) + "\n").repeat(2_000_000 / (width + 1));
        write(&mut writer, &all);
        let chunks = chunks(&live, Options::default()).await;
        assert!(text(&chunks) == all, "{width}");
        let lengths: Vec<_> = chunks.iter().map(pb::LogChunk::encoded_len).collect();
        // The first ones grow; the last ones are what is left.
        let third = lengths.len() / 3;
        for length in lengths.iter().skip(third).take(third) {
            assert!(
                (knoc_proto::CHUNK * 3 / 4..=knoc_proto::CHUNK).contains(length),
                "{width}: {lengths:?}"
            );
        }
    }
}

#[tokio::test]
async fn an_endless_line_that_is_not_a_log_is_skipped() {
    let folder = tempfile::tempdir().unwrap();
    let live = folder.path().join("0.log");
    let mut writer = writer(&live, 1 << 30, 1);
    write(&mut writer, "before\n");
    // A host that lost power leaves a hole of zeros.
    writer.append(&[vec![0; 3 * BLOCK], b"\n".to_vec()].concat(), 1);
    write(&mut writer, "after\n");
    assert_eq!(
        collect(&live, Options::default(), None).await,
        "before\nafter\n"
    );
}

/// The log of an older attempt is removed while somebody reads it: open files are read to their
/// end, and nothing fails.
#[tokio::test]
async fn a_reader_whose_series_is_removed_ends_with_what_it_has_open() {
    let folder = tempfile::tempdir().unwrap();
    let live = folder.path().join("0.log");
    let mut writer = writer(&live, 400, 100);
    for n in 0..40 {
        write(&mut writer, &numbered(n..n + 1));
    }
    let first = fs::read_to_string(&series(&live)[0]).unwrap();
    let (written, news) = watch::channel(0);
    let (ending, ended) = watch::channel(false);
    let follow = Follow {
        written: Some(news),
        ended,
    };
    let mut reader = Reader::begin(live.clone(), Options::default()).unwrap();
    reader.block.truncate(64);
    let mut text = reader.next().unwrap().unwrap();
    forget_older(&folder.path().join("2.log")).unwrap();
    assert_eq!(series(&live), Vec::<PathBuf>::new());
    while let Some(more) = reader.next().unwrap() {
        text.extend(more);
    }
    let lines = first
        .lines()
        .map(|line| &line[line.len() - "line 0".len()..]);
    let lines: Vec<_> = lines.map(str::trim_start).collect();
    assert_eq!(
        String::from_utf8(text).unwrap().lines().collect::<Vec<_>>(),
        lines
    );
    // A reader that asks for all of the log now gets nothing, and no error.
    let following = collect(&live, Options::default(), Some(follow));
    let end = async {
        written.send_modify(|batches| *batches += 1);
        ending.send_replace(true);
    };
    assert_eq!(tokio::join!(following, end).0, "");
}
