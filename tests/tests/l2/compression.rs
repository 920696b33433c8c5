//! Level 2: what `doctor` says about the compression of images, by what the site's runtime can do. The runtime is a script.

use std::{fs, os::unix::fs::PermissionsExt as _};

use anyhow::{Context as _, ensure};
use knoc_tests::{
    doctor::{Finding, examine},
    site::{Options, Site},
};

/// A site whose runtime has these options for `build`, and whose site file asks for this compression.
fn site(help: &str, compression: &str) -> anyhow::Result<Site> {
    let site = Site::new(Options {
        tables: format!("[images]\ncompression = \"{compression}\"\n"),
        ..Options::default()
    })?;
    let program = site.path("apptainer");
    let script = format!(
        "#!/bin/sh\ncase \"$1 $2\" in\n'build --help') echo '{help}' ;;\n--version*) echo 'apptainer version 1.4.5' ;;\n\
         *) exit 1 ;;\nesac\n"
    );
    site.put("apptainer", &script)?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o700))?;
    let config = fs::read_to_string(site.path("agent.toml"))?;
    let config = config.replace("runtime = \"process\"", "runtime = \"apptainer\"");
    let tools = format!("[tools]\napptainer = \"{}\"\n\n[listen]", program.display());
    site.put("agent.toml", &config.replace("[listen]", &tools))?;
    Ok(site)
}

async fn found(help: &str, compression: &str) -> anyhow::Result<Finding> {
    let site = site(help, compression)?;
    let _agent = site.agent(&[]).await?;
    let findings = examine(site.knocctl(["doctor"])?).await?;
    let mut findings = findings.into_iter();
    let found = findings.find(|finding| finding.check == "images: compression");
    found.context("doctor does not say how images are compressed")
}

#[tokio::test]
async fn doctor_says_how_images_are_compressed_and_what_keeps_the_site_from_more()
-> anyhow::Result<()> {
    let able = "--mksquashfs-args string   extra arguments";
    let old = "--notest   build without running tests";
    for (help, compression, ok, words) in [
        (able, "auto", true, "zstd"),
        (able, "lz4", true, "lz4"),
        (able, "gzip", true, "gzip"),
        (old, "auto", true, "Apptainer has from 1.4 on"),
        (old, "zstd", false, "Apptainer has from 1.4 on"),
    ] {
        let finding = found(help, compression).await?;
        ensure!(
            finding.ok == ok && finding.detail.contains(words),
            "{compression} with {help:?}: {finding:?}"
        );
        ensure!(
            ok || finding.cure.contains("compression = \"gzip\""),
            "{finding:?}"
        );
    }
    Ok(())
}
