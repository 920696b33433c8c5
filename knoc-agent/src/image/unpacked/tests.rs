use std::io::Write as _;

use proptest::prelude::*;

use super::*;

/// Sets the checksum of a header.
pub(in crate::image) fn seal(head: &mut [u8]) {
    head[148..156].fill(b' ');
    let sum: u32 = head.iter().map(|byte| u32::from(*byte)).sum();
    head[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

fn head(kind: u8, size: u64) -> Vec<u8> {
    let mut head = vec![0_u8; BLOCK];
    head[0] = b'f';
    head[124..136].copy_from_slice(format!("{size:011o}\0").as_bytes());
    head[156] = kind;
    seal(&mut head);
    head
}

fn sparse(real: u64, extended: bool) -> Vec<u8> {
    let mut head = head(b'S', 512);
    head[483..495].copy_from_slice(format!("{real:011o}\0").as_bytes());
    head[482] = u8::from(extended);
    seal(&mut head);
    head
}

fn pax(records: &[(&str, &str)]) -> Vec<u8> {
    let record = |(key, value): &(&str, &str)| {
        let rest = format!(" {key}={value}\n");
        let mut length = rest.len() + 1;
        while format!("{length}{rest}").len() != length {
            length += 1;
        }
        format!("{length}{rest}")
    };
    let text: String = records.iter().map(record).collect();
    let mut tar = head(b'x', u64::try_from(text.len()).unwrap());
    tar.extend_from_slice(text.as_bytes());
    tar.resize(tar.len().next_multiple_of(BLOCK), 0);
    tar
}

const BUDGET: Budget = Budget {
    bytes: 1 << 20,
    entries: 10,
};

fn read(tar: &[u8], piece: usize) -> Result<Budget, TarError> {
    let mut reader = Tar::new(BUDGET);
    for piece in tar.chunks(piece) {
        reader.push(piece)?;
    }
    reader.finish()
}

#[test]
fn honest_archives_are_read_in_any_pieces() {
    let end = vec![0; 1024];
    let file = [head(b'0', 700), vec![b'x'; 1024]].concat();
    // A file whose size is only in its extended header, as of files over 8 GiB.
    let large = [
        pax(&[("path", "a b"), ("size", "600")]),
        head(b'0', 0),
        vec![1; 1024],
    ]
    .concat();
    let holes = [sparse(100_000, true), vec![0; BLOCK], vec![2; BLOCK]].concat();
    let folder = head(b'5', 4096);
    let tar = [
        file.clone(),
        large.clone(),
        holes,
        folder,
        end.clone(),
        b"whatever".to_vec(),
    ]
    .concat();
    let used = u64::try_from(tar.len()).unwrap() + 100_000;
    for piece in [1, 7, 511, 512, 513, 100_000] {
        let left = read(&tar, piece).unwrap();
        assert_eq!(left.bytes, BUDGET.bytes - used, "pieces of {piece}");
        assert_eq!(left.entries, 6);
    }
    assert!(read(&[], 1).is_ok());
    assert!(read(&file, 512).is_ok(), "an archive without its end");
    // umoci writes layers like this.
    let bare = [head(b'0', 700), vec![b'x'; 700]].concat();
    assert!(read(&bare, 512).is_ok(), "nor the padding of its last file");
}

#[test]
fn folders_that_only_a_path_names_are_counted_once() {
    let at = |path: &str, kind| [pax(&[("path", path)]), head(kind, 0)].concat();
    let left = |tar: Vec<u8>| read(&tar, 512).map(|left| BUDGET.entries - left.entries);
    assert_eq!(left(at("a/b/c/f", b'0')), Ok(4));
    let more = [
        at("./a/b/c/f", b'0'),
        at("/a//b/c/g", b'0'),
        at("a/b/", b'5'),
    ];
    assert_eq!(left(more.concat()), Ok(6));
    let folder_first = [at("a/b/", b'5'), at("a/b/c", b'0'), at("b/a", b'0')];
    assert_eq!(left(folder_first.concat()), Ok(2 + 1 + 2));
    let deep = "a/".repeat(10);
    assert_eq!(left(at(&deep, b'5')), Ok(10));
    assert_eq!(left(at(&format!("{deep}f"), b'0')), Err(TarError::Entries));
    // As GNU tar writes long paths, and as its older format does.
    let mut long = format!("{deep}f\0").into_bytes();
    let length = u64::try_from(long.len()).unwrap();
    long.resize(BLOCK, 0);
    let long = [head(b'L', length), long, head(b'0', 0)].concat();
    assert_eq!(left(long), Err(TarError::Entries));
    let mut ustar = head(b'0', 0);
    ustar[257..263].copy_from_slice(b"ustar\0");
    ustar[345..353].copy_from_slice(b"a/b/c/d/");
    seal(&mut ustar);
    assert_eq!(left(ustar), Ok(5));
}

#[test]
fn what_only_seems_small_is_seen() {
    let far = "9000000000000";
    for (what, tar, expected) in [
        ("a sparse file", sparse(1 << 32, false), TarError::Bytes),
        (
            "a sparse file of an extended head",
            pax(&[("GNU.sparse.realsize", far)]),
            TarError::Bytes,
        ),
        (
            "one of version 0.0",
            pax(&[("GNU.sparse.size", far)]),
            TarError::Bytes,
        ),
        (
            "many empty files",
            head(b'0', 0).repeat(11),
            TarError::Entries,
        ),
        ("a long head", head(b'x', MAX_PAX + 1), TarError::Pax),
        ("a long name", head(b'L', MAX_PAX + 1), TarError::Pax),
        ("not a tar", vec![b'x'; 512], TarError::Head),
        ("half a head", head(b'0', 0)[..100].to_vec(), TarError::Cut),
        ("half a file", head(b'0', 5), TarError::Cut),
        (
            "something after an empty block",
            [vec![0; 512], head(b'0', 0)].concat(),
            TarError::Head,
        ),
    ] {
        assert_eq!(read(&tar, 512), Err(expected), "{what}");
    }
}

#[test]
fn numbers_of_heads() {
    assert_eq!(number(b"0000644\0"), Some(0o644));
    assert_eq!(number(b"   644 \0"), Some(0o644));
    assert_eq!(number(b"\0\0\0\0"), Some(0));
    assert_eq!(number(b"\x80\0\0\0\0\0\0\x01\0"), Some(256));
    assert_eq!(number(b"\xff\xff\xff"), None, "negative");
    assert_eq!(number(b"64x"), None);
    assert_eq!(number(b"\x80\xff\xff\xff\xff\xff\xff\xff\xff\xff"), None);
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn zstd_of(bytes: &[u8]) -> Vec<u8> {
    ruzstd::encoding::compress_to_vec(bytes, ruzstd::encoding::CompressionLevel::Fastest)
}

fn file(layer: &[u8]) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(layer).unwrap();
    file
}

fn measured(
    layer: &[u8],
    digest: &Digest,
    budget: Budget,
) -> Result<(Packing, Budget), LayerError> {
    let mut left = budget;
    let packing = measure(file(layer).path(), digest, &mut left, &|| false)?;
    Ok((packing, left))
}

#[test]
fn a_layer_is_measured_however_it_is_packed() {
    let tar = [head(b'0', 700), vec![b'x'; 1024], vec![0; 1024]].concat();
    let (one, two) = tar.split_at(900);
    let skipped = [b"\x50\x2a\x4d\x18\x03\0\0\0abc".to_vec(), zstd_of(&tar)].concat();
    for (layer, packing) in [
        (tar.clone(), Packing::None),
        (gzip(&tar), Packing::Gzip),
        ([gzip(one), gzip(two)].concat(), Packing::Gzip),
        (zstd_of(&tar), Packing::Zstd),
        ([zstd_of(one), zstd_of(two)].concat(), Packing::Zstd),
        (skipped, Packing::Zstd),
    ] {
        let digest = Digest::of(&layer);
        let (found, left) = measured(&layer, &digest, BUDGET).unwrap();
        assert_eq!(found, packing);
        assert_eq!(BUDGET.bytes - left.bytes, u64::try_from(tar.len()).unwrap());
        let wrong = measured(&layer, &Digest::of(b""), BUDGET).unwrap_err();
        assert!(
            wrong.to_string().contains("sent content with digest"),
            "{wrong}"
        );
        let cut = &layer[..layer.len() / 3];
        measured(cut, &Digest::of(cut), BUDGET).unwrap_err();
    }
}

#[test]
fn a_bomb_is_found_before_it_is_unpacked() {
    let zeros = [head(b'0', 7 << 30), vec![0; 4 << 20]].concat();
    for layer in [gzip(&zeros), zstd_of(&zeros), gzip(&sparse(1 << 32, false))] {
        assert!(layer.len() < 64 << 10, "{}", layer.len());
        let why = measured(&layer, &Digest::of(&layer), BUDGET).unwrap_err();
        assert_eq!(why, LayerError::TooLarge);
    }
}

#[test]
fn a_cancelled_pull_stops_the_measurement() {
    let layer = gzip(&[head(b'0', 1024), vec![0; 2048]].concat());
    let mut left = BUDGET;
    let stopped = measure(file(&layer).path(), &Digest::of(&layer), &mut left, &|| {
        true
    });
    assert!(stopped.is_err());
}

proptest! {
    #[test]
    fn no_bytes_panic_and_the_budget_only_shrinks(bytes in prop::collection::vec(any::<u8>(), 0..3000)) {
        if let Ok(left) = read(&bytes, 100) {
            prop_assert!(left.bytes <= BUDGET.bytes && left.entries <= BUDGET.entries);
        }
    }
}
