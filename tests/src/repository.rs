//! A repository of one test in the bed's registry.

use std::time::Duration;

use anyhow::Context as _;
use serde_json::Value;

use crate::{PodBuilder, World};

/// The time for a conversion by Apptainer, after those of other tests.
pub const PULLED: Duration = Duration::from_mins(5);

/// The registry's storage folder on its node.
const STORE: &str = "/var/spool/registry/docker/registry/v2/repositories/library";

/// The name of an image in the bed's registry.
#[must_use]
pub fn image(name: &str) -> String {
    PodBuilder::image_name().replace("busybox:latest", name)
}

/// A test's own repository in the registry.
#[derive(Debug)]
pub struct Repository<'a> {
    /// The test's world.
    pub world: &'a World,
    name: String,
}

impl<'a> Repository<'a> {
    /// A repository named as the test's namespace.
    #[must_use]
    pub fn new(world: &'a World) -> Self {
        let name = world.namespace.clone();
        Self { world, name }
    }

    /// The image's name in pods.
    #[must_use]
    pub fn image(&self) -> String {
        image(&format!("{}:latest", self.name))
    }

    /// Pushes an image that is in no cache, because no other image has its label. Returns the folder on the login node in
    /// which it was made, for the test to remove.
    pub async fn push_one_of_its_own(&self) -> anyhow::Result<String> {
        let (world, label) = (self.world, &self.world.namespace);
        let folder = format!("/scratch/{label}");
        let make = format!(
            "mkdir {folder} && skopeo copy -q --insecure-policy oci:/images/own.oci:1 oci:{folder}/oci:1 && \
             umoci config --image {folder}/oci:1 --config.label test={label}"
        );
        let make = world.on("login", ["sh", "-c", &make]);
        make.deadline(PULLED).ok().await?;
        self.push(&format!("oci:{folder}/oci:1")).await?;
        Ok(folder)
    }

    /// Moves the tag to that image, given in any format that skopeo reads.
    pub async fn push(&self, source: &str) -> anyhow::Result<()> {
        let target = format!("docker://{}", self.image());
        let copy = [
            "skopeo",
            "copy",
            "-q",
            "--insecure-policy",
            "--src-tls-verify=false",
            "--dest-tls-verify=false",
            source,
            &target,
        ];
        let copy = self.world.on("login", copy);
        copy.deadline(PULLED).ok().await?;
        Ok(())
    }

    /// Moves the tag to a version of the image `own`.
    pub async fn becomes(&self, version: &str) -> anyhow::Result<()> {
        let source = format!("docker://{}", image(&format!("own:{version}")));
        self.push(&source).await
    }

    /// The current digest of the tag in the registry.
    pub async fn inspect(&self) -> anyhow::Result<Value> {
        let source = format!("docker://{}", self.image());
        let inspect = ["skopeo", "inspect", "--tls-verify=false", &source];
        let output = self.world.on("login", inspect).ok().await?;
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    /// Removes a layer that the manifest names.
    pub async fn lose_its_last_layer(&self) -> anyhow::Result<()> {
        let layers = self.inspect().await?["Layers"].clone();
        let last = layers.as_array().and_then(|layers| layers.last());
        let last = last.and_then(Value::as_str).context("no layer")?;
        let link = format!("{STORE}/{}/_layers/{}", self.name, last.replace(':', "/"));
        self.world
            .on_as_root("ctl", ["rm", "-r", &link])
            .ok()
            .await?;
        Ok(())
    }

    /// Removes it from the registry.
    pub async fn remove(self) -> anyhow::Result<()> {
        let folder = format!("{STORE}/{}", self.name);
        self.world
            .on_as_root("ctl", ["rm", "-r", &folder])
            .ok()
            .await?;
        Ok(())
    }
}
