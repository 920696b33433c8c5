//! An image for the suites on the real stack: busybox and our own static programs, as a SIF on the shared
//! file system.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;

use crate::{Run, World};

/// The time to compile a file or to build a small image.
const BUILD: Duration = Duration::from_mins(5);

/// The programs in the image, each at `/NAME`.
const PROGRAMS: [&str; 3] = ["knoc-stamp", "knoc-readback", "knoc-dialer"];

/// The name in pods of the image in that folder.
#[must_use]
pub fn path(folder: &str) -> String {
    format!("{folder}/programs.sif")
}

/// Builds the image in that folder of the nodes' `/scratch`.
pub async fn build(world: &World, folder: &str) -> anyhow::Result<()> {
    let shell = |text: String| {
        world
            .on("login", ["bash", "-c", &text])
            .deadline(BUILD)
            .ok()
    };
    shell(format!("mkdir -p {folder}")).await?;
    let prefix = std::env::var("HPC_PREFIX").context("HPC_PREFIX is not set: make up")?;
    let here = PathBuf::from(prefix)
        .join("shared")
        .join(folder.trim_start_matches('/'));
    let mut files = String::new();
    for program in PROGRAMS {
        static_program(program, &here.join(program)).await?;
        files.extend(["  ", folder, "/", program, " /", program, "\n"]);
    }
    let definition = format!("Bootstrap: localimage\nFrom: /images/busybox.sif\n%files\n{files}");
    let image = path(folder);
    let build = format!(
        "cd {folder} && printf %s '{definition}' > image.def && \
         apptainer build --force image.new.sif image.def && mv image.new.sif {image}"
    );
    shell(build).await.context("building the image")?;
    Ok(())
}

/// Compiles one of our one-file programs as a static binary.
async fn static_program(name: &str, to: &Path) -> anyhow::Result<()> {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    let source = manifest.join("src/bin").join(format!("{name}.rs"));
    let rustc = Run::new("rustc").args(["--edition", "2024", "-O", "-C", "strip=symbols"]);
    let rustc = rustc.args(["--target", "x86_64-unknown-linux-musl", "-o"]);
    let rustc = rustc.arg(to).arg(&source).deadline(BUILD);
    rustc
        .ok()
        .await
        .with_context(|| format!("compiling {}", source.display()))?;
    Ok(())
}
