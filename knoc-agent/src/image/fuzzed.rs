//! Checks that the fuzz targets and the tests share: they feed arbitrary bytes in place of a
//! registry's texts and panic if a property does not hold.
//!
//! Compiled for tests, and with the feature `fuzzed` for the targets in `knoc-agent/fuzz`.

#![allow(
    unreachable_pub,
    clippy::panic,
    reason = "public for the fuzz targets; a harness reports what it found with a panic"
)]

use super::{
    auth,
    digest::Digest,
    file::ImageFile,
    guard::{Url, forbidden},
    manifest::{self, MAX_LAYERS, Manifest, Packing},
    unpacked::{Budget, Tar},
};

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
    }

    proptest! {
        #[test]
        fn whatever_a_registry_says(data in "\\PC{0,200}") {
            manifests(data.as_bytes());
            auth_headers(data.as_bytes());
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
