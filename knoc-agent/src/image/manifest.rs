//! PURE: parses manifests and indexes of images, in the formats of OCI and of Docker's schema 2.
//!
//! They come from an untrusted server. Lists are bounded while they are parsed, because four MiB of
//! `{},{},…` would take a hundred times as much memory. A document that is both an index and an
//! image is rejected.

use std::{collections::HashMap, fmt, marker::PhantomData};

use serde::{
    Deserialize, Serialize,
    de::{Deserializer, Error as _, SeqAccess, Visitor},
};

use super::digest::Digest;

/// The largest manifest or index; registries have the same limit.
pub(super) const MAX_MANIFEST: usize = 4 << 20;
/// The largest image config.
pub(super) const MAX_CONFIG: usize = 4 << 20;
/// The most layers of one image; Docker creates at most 127.
pub(super) const MAX_LAYERS: usize = 500;
/// The most entries of one index.
const MAX_ENTRIES: usize = 1000;
/// The media types of a SIF file that was pushed as it is. Early versions of Singularity wrote the second one, misspelt.
const SIF: [&str; 2] = [
    "application/vnd.sylabs.sif.layer.v1.sif",
    "appliciation/vnd.sylabs.sif.layer.tar",
];
/// The media types that a request for a manifest accepts.
pub(super) const ACCEPT: &str = "application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json, \
     application/vnd.docker.distribution.manifest.v2+json, application/vnd.docker.distribution.manifest.list.v2+json";
/// The architecture of the site's nodes, which is assumed to be the agent's own.
pub(super) const ARCHITECTURE: &str = if cfg!(target_arch = "aarch64") {
    "arm64"
} else {
    "amd64"
};

/// Its variant that is the same as none.
const BASELINE: &str = if cfg!(target_arch = "aarch64") {
    "v8"
} else {
    "v1"
};

/// A list of at most `N` elements.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Few<T, const N: usize>(pub(super) Vec<T>);

impl<'de, T: Deserialize<'de>, const N: usize> Deserialize<'de> for Few<T, N> {
    fn deserialize<D: Deserializer<'de>>(input: D) -> Result<Self, D::Error> {
        struct Elements<T, const N: usize>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>, const N: usize> Visitor<'de> for Elements<T, N> {
            type Value = Few<T, N>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a list of at most {N} elements")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
                let mut all = Vec::new();
                while let Some(element) = seq.next_element()? {
                    if all.len() == N {
                        return Err(A::Error::custom(format!("more than {N} elements")));
                    }
                    all.push(element);
                }
                Ok(Few(all))
            }
        }
        input.deserialize_seq(Elements(PhantomData))
    }
}

/// For `deserialize_with`: an optional list of texts, with at most as many as a program can be
/// started with.
pub(super) fn texts<'de, D: Deserializer<'de>>(input: D) -> Result<Option<Vec<String>>, D::Error> {
    let list: Option<Few<String, 10_000>> = Option::deserialize(input)?;
    Ok(list.map(|few| few.0))
}

/// A blob of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Descriptor {
    pub(super) digest: Digest,
    pub(super) size: u64,
}

/// An image for one platform.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Image {
    pub(super) config: Descriptor,
    pub(super) layers: Vec<Descriptor>,
    /// Whether its only layer is a SIF file, and not an archive of files. Its config is of no use then.
    pub(super) sif: bool,
}

impl Image {
    /// The size of all its blobs, in bytes.
    pub(super) fn size(&self) -> u64 {
        let layers = self.layers.iter().map(|layer| layer.size);
        layers.fold(self.config.size, u64::saturating_add)
    }
}

/// What a registry has under a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Manifest {
    Image(Image),
    /// An index, with the digest of the image for this platform.
    Index(Digest),
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Raw {
    schema_version: Option<u64>,
    config: Option<RawDescriptor>,
    layers: Option<Few<RawDescriptor, MAX_LAYERS>>,
    manifests: Option<Few<RawDescriptor, MAX_ENTRIES>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawDescriptor {
    #[serde(default)]
    media_type: String,
    digest: String,
    size: u64,
    platform: Option<Platform>,
}

#[derive(Deserialize)]
struct Platform {
    #[serde(default)]
    os: String,
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    variant: String,
}

/// Parses a registry's answer.
pub(super) fn read(text: &[u8]) -> Result<Manifest, String> {
    if text.len() > MAX_MANIFEST {
        return Err(format!(
            "the manifest is longer than the {MAX_MANIFEST} bytes allowed"
        ));
    }
    let raw: Raw = serde_json::from_slice(text)
        .map_err(|error| format!("the manifest cannot be read: {error}"))?;
    if raw.schema_version == Some(1) {
        return Err(
            "the image has a manifest of Docker's schema 1, which is not supported: push it again"
                .to_owned(),
        );
    }
    match (raw.manifests, raw.config, raw.layers) {
        (Some(entries), None, None) => choose(&entries.0).map(Manifest::Index),
        (None, Some(config), layers) => {
            let layers = layers.map_or_else(Vec::new, |layers| layers.0);
            image(&config, &layers).map(Manifest::Image)
        }
        (Some(_), _, _) => Err("the manifest is an index and an image at once".to_owned()),
        (None, None, _) => Err("the manifest has neither `config` nor `manifests`".to_owned()),
    }
}

fn choose(entries: &[RawDescriptor]) -> Result<Digest, String> {
    let fits = |entry: &&RawDescriptor| {
        let platform = entry.platform.as_ref();
        platform.is_some_and(|it| it.os == "linux" && it.architecture == ARCHITECTURE)
    };
    // The variant that every processor of the architecture runs, or else the one that asks for least.
    let variant = |entry: &&RawDescriptor| {
        let variant = entry.platform.as_ref().map_or("", |it| it.variant.as_str());
        let baseline = ["", BASELINE].contains(&variant);
        (!baseline, variant.to_owned())
    };
    let of_no_platform = || match entries {
        // The image's config says what it is for.
        [one] if one.platform.is_none() => Some(one),
        _ => None,
    };
    let fitting = entries.iter().filter(fits).min_by_key(variant);
    let Some(entry) = fitting.or_else(of_no_platform) else {
        let names = entries.iter().filter_map(|entry| entry.platform.as_ref());
        let names = names.map(|it| format!("{}/{}", it.os, it.architecture));
        let names: Vec<String> = names.take(10).collect();
        return Err(format!(
            "there is no image for linux/{ARCHITECTURE}, only for {names:?}"
        ));
    };
    digest(&entry.digest)
}

fn image(config: &RawDescriptor, layers: &[RawDescriptor]) -> Result<Image, String> {
    let config = Descriptor {
        digest: digest(&config.digest)?,
        size: config.size,
    };
    if config.size > u64::try_from(MAX_CONFIG).unwrap_or(u64::MAX) {
        return Err(format!(
            "the image's config is longer than the {MAX_CONFIG} bytes allowed"
        ));
    }
    let sif = layers.iter().any(is_sif);
    if sif && layers.len() > 1 {
        return Err(format!(
            "a SIF file is the only layer of its image, and this one has {}",
            layers.len()
        ));
    }
    let layer = |layer: &RawDescriptor| {
        if !sif && !is_layer(&layer.media_type) {
            return Err(format!(
                "a layer is of the type {:?}: this is not a container image, or not one that can be run",
                layer.media_type
            ));
        }
        Ok(Descriptor {
            digest: digest(&layer.digest)?,
            size: layer.size,
        })
    };
    let layers: Vec<Descriptor> = layers.iter().map(layer).collect::<Result<_, _>>()?;
    one_size(&layers)?;
    Ok(Image {
        config,
        layers,
        sif,
    })
}

/// Checks that a layer that the image has several times always has the same size. Each time it costs as much to check as
/// the first time, so that the size of the image must count it each time.
fn one_size(layers: &[Descriptor]) -> Result<(), String> {
    let mut sizes = HashMap::new();
    for layer in layers {
        if *sizes.entry(&layer.digest).or_insert(layer.size) != layer.size {
            let digest = &layer.digest;
            return Err(format!("the manifest names {digest} with different sizes"));
        }
    }
    Ok(())
}

fn is_sif(layer: &RawDescriptor) -> bool {
    SIF.contains(&layer.media_type.as_str())
}

fn digest(text: &str) -> Result<Digest, String> {
    text.parse()
        .map_err(|error| format!("the manifest names {text:?}: {error}"))
}

/// Whether the type is a tar archive in a known compression. The first bytes say which one.
fn is_layer(media_type: &str) -> bool {
    let families = [
        "application/vnd.oci.image.layer.v1.tar",
        "application/vnd.oci.image.layer.nondistributable.v1.tar",
        "application/vnd.docker.image.rootfs.diff.tar",
        "application/vnd.docker.image.rootfs.foreign.diff.tar",
    ];
    let rest = families
        .iter()
        .find_map(|family| media_type.strip_prefix(family));
    rest.is_some_and(|rest| matches!(rest, "" | "+gzip" | ".gzip" | "+zstd" | ".zstd"))
}

/// How a layer is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Packing {
    None,
    Gzip,
    Zstd,
}

impl Packing {
    /// Detected from the first bytes of a layer, since the registry's media type may be wrong.
    pub(super) fn of(head: &[u8]) -> Self {
        match head {
            [0x1f, 0x8b, ..] => Self::Gzip,
            // A Zstandard frame or a skippable frame.
            [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Self::Zstd,
            _ => Self::None,
        }
    }

    fn media_type(self) -> &'static str {
        match self {
            Self::None => "application/vnd.oci.image.layer.v1.tar",
            Self::Gzip => "application/vnd.oci.image.layer.v1.tar+gzip",
            Self::Zstd => "application/vnd.oci.image.layer.v1.tar+zstd",
        }
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Written<'a> {
    media_type: &'a str,
    digest: String,
    size: u64,
}

/// The manifest of an OCI image layout with these blobs. It is written from what was parsed, so
/// that the runtime reads exactly what was checked here.
pub(super) fn write(image: &Image, packings: &[Packing]) -> Result<Vec<u8>, serde_json::Error> {
    #[derive(Serialize)]
    #[serde(rename_all = "camelCase")]
    struct Whole<'a> {
        schema_version: u32,
        media_type: &'a str,
        config: Written<'a>,
        layers: Vec<Written<'a>>,
    }
    let written = |media_type, descriptor: &Descriptor| Written {
        media_type,
        digest: descriptor.digest.to_string(),
        size: descriptor.size,
    };
    let layers = image.layers.iter().zip(packings);
    serde_json::to_vec(&Whole {
        schema_version: 2,
        media_type: "application/vnd.oci.image.manifest.v1+json",
        config: written("application/vnd.oci.image.config.v1+json", &image.config),
        layers: layers
            .map(|(layer, packing)| written(packing.media_type(), layer))
            .collect(),
    })
}

/// The `index.json` of a layout with one manifest.
pub(super) fn write_index(manifest: &[u8]) -> Result<Vec<u8>, serde_json::Error> {
    serde_json::to_vec(&serde_json::json!({
        "schemaVersion": 2,
        "manifests": [{
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "digest": Digest::of(manifest).to_string(),
            "size": manifest.len(),
        }],
    }))
}

/// The reasons of an error response, from its body.
pub(super) fn reasons(body: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    struct Envelope {
        errors: Few<Reason, 16>,
    }
    #[derive(Deserialize)]
    struct Reason {
        #[serde(default)]
        code: String,
        #[serde(default)]
        message: String,
    }
    let envelope: Envelope = serde_json::from_slice(body).ok()?;
    let reasons = envelope.errors.0.into_iter();
    let reasons = reasons.map(|reason| match reason.message.as_str() {
        "" => reason.code,
        _ => reason.message,
    });
    let reasons: Vec<String> = reasons.filter(|text| !text.is_empty()).collect();
    (!reasons.is_empty()).then(|| reasons.join("; "))
}
