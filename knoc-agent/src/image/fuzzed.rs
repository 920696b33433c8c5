//! Checks that the fuzz targets and the tests share: they feed arbitrary bytes in place of a
//! registry's texts and panic if a property does not hold.
//!
//! Compiled for tests, and with the feature `fuzzed` for the targets in `knoc-agent/fuzz`.

#![allow(
    unreachable_pub,
    clippy::panic,
    clippy::expect_used,
    reason = "public for the fuzz targets; a harness reports what it found with a panic"
)]

use std::{fs::File, io::Write as _, os::fd::AsRawFd as _, path::PathBuf};

use rustix::fs::{MemfdFlags, memfd_create};

use super::{
    Name, auth,
    digest::Digest,
    file::ImageFile,
    guard::{self, Url, forbidden},
    library, local,
    manifest::{self, MAX_LAYERS, Manifest, Packing},
    reference::{self, Reference},
    unpacked::{Budget, Tar},
};
use crate::config::Registry;

/// Parses any bytes as a manifest, an index, an image's config and a registry's error reasons.
///
/// # Panics
/// If a list is longer than its limit, a digest could leave its directory, or what is written for
/// the runtime differs from what was read.
pub fn manifests(data: &[u8]) {
    match manifest::read(data) {
        Ok(Manifest::Image(image)) => {
            assert!(image.layers.len() <= MAX_LAYERS);
            let blobs = image.layers.iter().chain([&image.config]);
            blobs.for_each(|blob| in_its_folder(&blob.digest));
            // A SIF file is not written into a layout.
            if image.sif {
                assert_eq!(image.layers.len(), 1);
                return;
            }
            let packings = vec![Packing::Gzip; image.layers.len()];
            let written = manifest::write(&image, &packings);
            let Ok(written) = written else {
                panic!("an image that was read cannot be written")
            };
            assert_eq!(manifest::read(&written), Ok(Manifest::Image(image)));
            assert!(manifest::write_index(&written).is_ok());
        }
        Ok(Manifest::Index(digest)) => in_its_folder(&digest),
        Err(why) => assert!(!why.is_empty()),
    }
    if let Ok((digest, image)) = library::image(data) {
        in_its_folder(&digest);
        assert!(image.sif && image.layers.len() == 1);
    }
    if let Some(reason) = library::reason(data) {
        assert!(!reason.is_empty());
    }
    if let Ok(file) = ImageFile::of_oci(data) {
        assert!(file.env.is_none_or(|env| env.len() <= 10_000));
    }
    if let Some(reasons) = manifest::reasons(data) {
        assert!(!reasons.is_empty() && reasons.len() <= data.len() * 4 + 64);
    }
}

fn in_its_folder(digest: &Digest) {
    let digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    assert!(!digest.hex().is_empty() && digest.hex().bytes().all(digit));
    assert!(matches!(digest.algorithm(), "sha256" | "sha512"));
}

/// Parses any bytes as the `WWW-Authenticate` headers of a 401 response, one per line, and as the
/// answer of a realm.
///
/// # Panics
/// If the result is a URL that is invalid, or a token that could end its header.
pub fn auth_headers(data: &[u8]) {
    let lines = data.split(|byte| *byte == b'\n');
    if let Ok(auth::Challenge::Bearer(realm)) = auth::challenge(lines) {
        let text = auth::token_url(&realm, "repository:a/b:pull");
        if let Ok(url) = Url::parse(&text) {
            assert!(!url.host.is_empty() && !url.host.contains(['@', '/', '?', '#']));
            assert!(url.port > 0 && url.path.starts_with('/'));
            let again = Url::parse(&format!(
                "{}://{}{}",
                url.scheme(),
                url.authority(),
                url.path
            ));
            assert_eq!(again.as_ref(), Ok(&url));
            if let Ok(ip) = url.host.parse() {
                assert!(forbidden(ip).is_none_or(|kind| !kind.is_empty()));
            }
        }
    }
    if let Ok(token) = auth::token(data) {
        let bytes = token.bearer.as_bytes();
        assert!(
            bytes.starts_with(b"Bearer ") && !bytes.iter().any(|byte| b"\r\n\0".contains(byte))
        );
    }
    if let Ok(location) = std::str::from_utf8(data)
        && let Ok(here) = Url::parse("https://a.b:5000/v2/x/blobs/d")
        && let Ok(there) = here.join(location)
    {
        assert!(!there.host.is_empty() && there.path.starts_with('/'));
    }
}

/// Checks any bytes as a layer's archive, in one piece and in several.
///
/// # Panics
/// If the pieces lead to another result, or the budget grows.
pub fn layers(data: &[u8]) {
    let budget = Budget {
        bytes: 1 << 20,
        entries: 100,
    };
    let read = |size: usize| {
        let mut tar = Tar::new(budget);
        for piece in data.chunks(size) {
            tar.push(piece)?;
        }
        tar.finish()
    };
    let whole = read(usize::MAX);
    if let Ok(left) = whole {
        assert!(left.bytes <= budget.bytes && left.entries <= budget.entries);
        assert_eq!(read(7), whole);
        assert_eq!(read(512), whole);
    }
}

/// Looks at any bytes as a SIF file that was pushed, and at its beginning as the config in one.
///
/// # Panics
/// If a file is whole that has not even a header.
pub fn pushed_sif(data: &[u8]) {
    let file = memfd_create("image", MemfdFlags::CLOEXEC).expect("a file in memory");
    let mut file = File::from(file);
    file.write_all(data).expect("it is written");
    let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    if let Ok(Some((_, sif))) = local::open(&path) {
        assert!(!local::is_whole(&sif) || data.len() >= 128);
    }
    if let Some(config) = std::str::from_utf8(data).ok().and_then(ImageFile::of_sif)
        && let Ok(config) = config.bounded()
    {
        let volumes = config.volume_paths();
        assert!(volumes.iter().all(|path| path.starts_with('/')));
    }
}

/// Parses any bytes as the name of an image in a pod.
///
/// # Panics
/// If a name is another one when it is read again, or a registry can be written so that the site's policy or mirrors do not
/// apply to it.
pub fn image_names(data: &[u8]) {
    let parse = |text: &str| reference::parse(text, Some("library.example.org"));
    let Ok(Ok(Reference::Registry(name))) = std::str::from_utf8(data).map(parse) else {
        return;
    };
    let whole = name.whole();
    let again = parse(&whole);
    assert_eq!(again, Ok(Reference::Registry(name.clone())), "{whole}");
    if name.in_library() {
        assert_eq!(name.registry(), "library.example.org");
        return;
    }
    assert_eq!(Name::of_pod(&whole).as_ref(), Ok(&name), "{whole}");
    let registry = name.registry();
    assert!(!registry.bytes().any(|byte| byte.is_ascii_uppercase()));
    assert_eq!(
        guard::host_of(registry),
        guard::host_of(&registry.to_uppercase())
    );
    let capital = registry.to_ascii_uppercase();
    assert_eq!(
        reference::allowed(&name, std::slice::from_ref(&capital)),
        Ok(())
    );
    let mirror = Registry {
        prefix: capital,
        mirror: Some("mirror.example.org".to_owned()),
        insecure: false,
        credentials: false,
    };
    if let Ok(source) = reference::source(&name, &[mirror], None) {
        assert_eq!(source.reference.registry(), "mirror.example.org");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn corpus(target: &str, harness: fn(&[u8])) {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("fuzz/corpus")
            .join(target);
        let mut inputs = 0;
        for entry in std::fs::read_dir(folder).unwrap() {
            harness(&std::fs::read(entry.unwrap().path()).unwrap());
            inputs += 1;
        }
        assert!(inputs > 0, "no corpus of {target}");
    }

    #[test]
    fn the_corpora_pass() {
        corpus("manifests", manifests);
        corpus("auth_headers", auth_headers);
        corpus("layers", layers);
        corpus("pushed_sif", pushed_sif);
        corpus("image_names", image_names);
    }

    proptest! {
        #[test]
        fn whatever_a_registry_says(data in "\\PC{0,200}") {
            manifests(data.as_bytes());
            auth_headers(data.as_bytes());
            pushed_sif(data.as_bytes());
            image_names(data.as_bytes());
        }

        #[test]
        fn whatever_a_name_says(
            host in "(oras://|docker://|library://)?([A-Za-z0-9.-]{1,10}(:[0-9]{1,5})?|\\[[0-9A-F:]{2,9}\\](:5000)?)",
            rest in "(/[a-z0-9._-]{1,5}){1,3}(:[A-Za-z0-9]{1,3})?",
        ) {
            image_names(format!("{host}{rest}").as_bytes());
        }

        #[test]
        fn whatever_numbers_a_sif_file_has(
            numbers in prop::collection::vec(prop_oneof![any::<u64>(), 0_u64..200], 6),
            length in 0_usize..200,
        ) {
            let mut bytes = vec![0; 200];
            bytes[32..41].copy_from_slice(b"SIF_MAGIC");
            for (number, at) in numbers.iter().zip((80..).step_by(8)) {
                bytes[at..at + 8].copy_from_slice(&number.to_le_bytes());
            }
            bytes.truncate(length);
            pushed_sif(&bytes);
        }

        #[test]
        fn whatever_a_challenge_says(
            scheme in "(Bearer|bearer|Basic|[a-z]{0,5})",
            realm in "(https?://)?[a-z0-9.:@\\[\\]/?#%&=-]{0,40}",
            rest in "\\PC{0,40}",
        ) {
            auth_headers(format!("{scheme} realm=\"{realm}\",service=\"{rest}\"").as_bytes());
        }

        #[test]
        fn whatever_a_manifest_holds(
            parts in prop::collection::vec(prop_oneof![
                Just(r#""schemaVersion":2"#.to_owned()),
                Just(r#""layers":[]"#.to_owned()),
                Just(r#""manifests":[]"#.to_owned()),
                "\"config\":\\{\"digest\":\"sha(256|512):[a-f0-9]{62,66}\",\"size\":[0-9]{1,20}\\}",
                "\"layers\":\\[\\{\"mediaType\":\"application/vnd.(oci.image.layer.v1.tar|sylabs.sif.layer.v1.sif)\",\"digest\":\"sha256:[a-f0-9]{64}\",\"size\":[0-9]{1,4}\\}\\]",
            ], 0..5),
        ) {
            manifests(format!("{{{}}}", parts.join(",")).as_bytes());
        }
    }
}
