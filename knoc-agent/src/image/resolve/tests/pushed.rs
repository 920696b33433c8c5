//! Tests of images that were pushed as SIF files (`oras://`).

use super::*;

const SIF_TYPE: &str = "application/vnd.sylabs.sif.layer.v1.sif";
const NAME: &str = "oras://sif:1";

/// A SIF file of 200 bytes, 72 of them data; the fake runtime says its size as the command of its config.
pub(super) fn sif() -> Vec<u8> {
    let mut bytes = vec![0; 32];
    bytes.extend_from_slice(b"SIF_MAGIC");
    bytes.resize(112, 0);
    bytes.extend([128_u64, 72].map(u64::to_le_bytes).concat());
    bytes.resize(200, 7);
    bytes
}

fn pushed(layers: &[(&str, &[u8])]) -> String {
    let layer = |(media_type, bytes): &(&str, &[u8])| {
        let (digest, size) = (Digest::of(bytes), bytes.len());
        format!(r#"{{"mediaType":"{media_type}","digest":"{digest}","size":{size}}}"#)
    };
    let layers: Vec<String> = layers.iter().map(layer).collect();
    format!(
        r#"{{"schemaVersion":2,"config":{{"mediaType":"application/vnd.sylabs.sif.config.v1+json","digest":"{}","size":2}},"layers":[{}]}}"#,
        Digest::of(b"{}"),
        layers.join(",")
    )
}

/// A registry with that manifest under `library/sif`, and with `blob` in place of the blob `named`.
async fn world(manifest: &str, named: &[u8], blob: &[u8]) -> World {
    let digest = Digest::of(named).to_string();
    let content = one().text("library/sif", manifest).falsified(&digest, blob);
    let world = World::of(content).await;
    write_program(&world.dir.path().join("apptainer"), SIF);
    world
}

#[tokio::test]
async fn a_pushed_sif_is_used_as_it_is_and_kept_by_its_digest() {
    let manifest = pushed(&[(SIF_TYPE, &sif()[..])]);
    let mut world = world(&manifest, &sif(), &sif()).await;
    let all = (0..20).map(|_| world.images.resolve(NAME, PullPolicy::Always, &[]));
    for image in futures::future::join_all(all).await {
        let image = image.unwrap();
        assert_eq!(image.config.cmd, ["200"]);
        assert_eq!(std::fs::read(&image.path).unwrap(), sif());
        let id = format!("oras://docker.io/library/sif@{}", digest(&manifest));
        assert_eq!(image.image_id, id);
        // It starts as a SIF file of the site does.
        assert_eq!(image.file.unwrap().size, 200);
    }
    // `list` and `dump`, and nothing was converted.
    assert_eq!(world.pulls(), 2);
    let blobs = world.registry.seen.count("GET", "/blobs/");
    assert_eq!(blobs, 1, "its config is of no use");
    world.off.store(true, Ordering::SeqCst);
    world.again();
    let kept = world.images.resolve(NAME, PullPolicy::IfNotPresent, &[]);
    assert!(kept.await.unwrap().file.is_some());
    let asks = world.images.resolve(NAME, PullPolicy::Always, &[]);
    asks.await.unwrap_err();
}

#[tokio::test]
async fn a_cached_image_is_not_taken_for_one_of_the_other_kind() {
    let manifest = pushed(&[(SIF_TYPE, &sif()[..])]);
    let world = world(&manifest, &sif(), &sif()).await;
    let kept = world.images.resolve(NAME, PullPolicy::Always, &[]);
    kept.await.unwrap();
    let by_digest = format!("sif@{}", digest(&manifest));
    for name in ["sif:1", &by_digest] {
        for policy in [PullPolicy::Always, PullPolicy::IfNotPresent] {
            let error = world.images.resolve(name, policy, &[]).await.unwrap_err();
            let expected = "write oras:// before its name";
            assert!(error.message.contains(expected), "{name}: {error}");
        }
        let never = world.images.resolve(name, PullPolicy::Never, &[]);
        never.await.unwrap_err();
    }
}

type Case<'a> = (String, &'a [u8], &'a [u8], &'a str, &'a str);

#[tokio::test]
async fn what_is_not_one_sif_file_is_rejected_by_name() {
    let (sif, layer) = (sif(), layer());
    let cut = &sif[..199];
    let tar_type = "application/vnd.oci.image.layer.v1.tar";
    let mut other = sif.clone();
    other[99] = 8;
    let text = b"not a SIF file, however long it may be, and a bit more of it";
    let good = pushed(&[(SIF_TYPE, &sif[..])]);
    let two = pushed(&[(SIF_TYPE, &sif[..]), (tar_type, &layer[..])]);
    // The manifest, the layer that it names and the one that is sent; the name that the pod has, and the words of the error.
    let cases: [Case<'_>; 7] = [
        (two, &sif, &sif, NAME, "the only layer"),
        (
            pushed(&[("application/x-tool", &sif[..])]),
            &sif,
            &sif,
            NAME,
            "of the type \"application/x-tool\"",
        ),
        (
            good.clone(),
            &sif,
            &sif,
            "sif:1",
            "write oras:// before its name",
        ),
        (
            good.clone(),
            &sif,
            &sif,
            "oras://one:v1",
            "leave oras:// out",
        ),
        (good, &sif, &other, NAME, "instead of sha256:"),
        (
            pushed(&[(SIF_TYPE, &text[..])]),
            text,
            text,
            NAME,
            "is not a SIF file",
        ),
        (
            pushed(&[(SIF_TYPE, cut)]),
            cut,
            cut,
            NAME,
            "not a whole one",
        ),
    ];
    for (manifest, named, blob, name, expected) in cases {
        let world = world(&manifest, named, blob).await;
        let error = world.images.resolve(name, PullPolicy::Always, &[]).await;
        let error = error.unwrap_err();
        assert_eq!(error.reason(), "ErrImagePull", "{error}");
        assert!(error.message.contains(expected), "{expected}: {error}");
        assert!(error.message.contains("library/"), "{error}");
    }
}
