//! How the files of an image are compressed when it is converted.
//!
//! gzip, which every runtime writes and reads, takes ten times as long to write as zstd, and programs start more slowly from
//! it. The runtime writes anything else only if its command `build` passes arguments on to mksquashfs, which it is asked once.
//! That it has failed, or that a compute node could not read what it wrote, is known afterwards: no pod fails for it, because
//! the image is then converted with gzip, and the shim has its files unpacked. [`choose`] and [`describe`] are PURE, and decide.
//!
//! [`Compressor`] owns what is known. It is not kept on disk: shims repeat their reports, and the rest is found out again. What has
//! failed counts for a day: it may have been a full disk, or a node that was repaired since.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use knoc_proto::error::chain;
use tokio::time::Instant;

use super::{Settings, untrusted::shown};
use crate::config::Compression;

/// The option of the runtime's command `build`; Apptainer has it from 1.4 on, SingularityCE has not.
const OPTION: &str = "--mksquashfs-args";

/// How long a failure counts. To find out again costs a second conversion, or one start of a container from unpacked files.
const COUNTS: Duration = Duration::from_hours(24);

/// The compression of one image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Method {
    Gzip,
    Zstd,
    Lz4,
}

impl Method {
    /// The name, as in the site file.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Zstd => "zstd",
            Self::Lz4 => "lz4",
        }
    }

    /// The arguments of mksquashfs; `None` if the runtime's own do.
    fn arguments(self) -> Option<&'static str> {
        match self {
            Self::Gzip => None,
            // The level of mksquashfs itself is 15, which takes as long as gzip.
            Self::Zstd => Some("-comp zstd -Xcompression-level 3"),
            Self::Lz4 => Some("-comp lz4"),
        }
    }

    /// The arguments of the runtime that convert `source` to the file `target`.
    pub(super) fn argv<'a>(self, target: &'a str, source: &'a str) -> Vec<&'a str> {
        match self.arguments() {
            None => vec!["pull", "--disable-cache", "--force", target, source],
            // `pull` passes no arguments on to mksquashfs. For such a source it does what `build` does.
            Some(arguments) => vec![
                "build",
                "--disable-cache",
                "--force",
                "--notest",
                OPTION,
                arguments,
                target,
                source,
            ],
        }
    }
}

/// What was found out.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Known {
    /// Whether the runtime passes arguments on to mksquashfs. `None`: it was not asked yet, or did not answer.
    passes: Option<bool>,
    /// How the runtime failed to convert an image that it then converted with gzip.
    failed: Option<Failure>,
    /// A compute node whose runtime could not mount an image with the compression that is wanted.
    unread: Option<Failure>,
}

/// What has failed, and when.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Failure {
    what: String,
    at: Instant,
}

impl Failure {
    fn now(what: String) -> Self {
        Self {
            what,
            at: Instant::now(),
        }
    }
}

impl Known {
    /// PURE: forgets the failures that do not count any more.
    fn forget(&mut self, now: Instant) {
        for failure in [&mut self.failed, &mut self.unread] {
            failure.take_if(|it| now.duration_since(it.at) >= COUNTS);
        }
    }
}

/// PURE: the compression that the site wants.
fn wanted(setting: Compression) -> Method {
    match setting {
        Compression::Gzip => Method::Gzip,
        Compression::Auto | Compression::Zstd => Method::Zstd,
        Compression::Lz4 => Method::Lz4,
    }
}

/// PURE: the compression of the next image.
fn choose(setting: Compression, known: &Known) -> Method {
    let written = known.passes == Some(true) && known.failed.is_none();
    // A site that names a compression has decided for its nodes.
    let read = setting != Compression::Auto || known.unread.is_none();
    if written && read {
        wanted(setting)
    } else {
        Method::Gzip
    }
}

/// PURE: the finding of `doctor`, and what to do if it is an error.
fn describe(setting: Compression, known: &Known) -> (Result<String, String>, String) {
    let (name, next) = (wanted(setting).name(), choose(setting, known).name());
    if setting == Compression::Gzip {
        return (Ok("gzip, as the site file says".to_owned()), String::new());
    }
    let or = "set compression = \"gzip\" under [images] of the site file";
    if let Some(Failure { what, .. }) = &known.failed {
        let what = format!(
            "gzip for a day, because the runtime failed to compress an image with {name}: {what}"
        );
        let cure = format!("install a mksquashfs that can write {name}, or {or}");
        return (Err(what), cure);
    }
    if let Some(Failure { what: node, .. }) = &known.unread {
        let what = format!(
            "{next} for now: the runtime on {node} could not mount an image that is compressed with {name}, and unpacks such \
             an image at each start"
        );
        let cure = format!("install the same version of the runtime on all compute nodes, or {or}");
        return (Err(what), cure);
    }
    let old = format!(
        "gzip: the runtime's command `build` does not have the option {OPTION}, which Apptainer has from 1.4 on"
    );
    match known.passes {
        Some(true) => (Ok(name.to_owned()), String::new()),
        Some(false) if setting == Compression::Auto => (Ok(old), String::new()),
        Some(false) => (Err(old), format!("install Apptainer 1.4 or newer, or {or}")),
        None => {
            let what = "gzip, because the runtime does not answer `build --help`".to_owned();
            (Err(what), format!("run that command by hand, or {or}"))
        }
    }
}

/// Decides how each image is compressed, by what is known so far.
#[derive(Debug)]
pub(super) struct Compressor {
    setting: Compression,
    known: Mutex<Known>,
}

impl Compressor {
    pub(super) fn new(setting: Compression) -> Self {
        Self {
            setting,
            known: Mutex::default(),
        }
    }

    /// What counts now.
    fn known(&self) -> MutexGuard<'_, Known> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.forget(Instant::now());
        known
    }

    /// The compression of the next image. Cancel safe.
    pub(super) async fn method(&self, settings: &Settings) -> Method {
        self.ask(settings).await;
        choose(self.setting, &self.known())
    }

    /// What `doctor` says, and what to do if that is an error. Cancel safe.
    pub(super) async fn describe(&self, settings: &Settings) -> (Result<String, String>, String) {
        self.ask(settings).await;
        describe(self.setting, &self.known())
    }

    /// Asks the runtime which options its command `build` has, until it has answered once.
    async fn ask(&self, settings: &Settings) {
        if self.setting == Compression::Gzip || self.known().passes.is_some() {
            return;
        }
        let Some(command) = settings.command() else {
            return;
        };
        match command.args(["build", "--help"]).run().await {
            Ok(output) => {
                let passes = output.text().contains(OPTION);
                self.known().passes = Some(passes);
            }
            Err(error) => tracing::warn!(
                error = chain(&error),
                "the runtime does not say how it can compress images, so gzip is used"
            ),
        }
    }

    /// Notes that the runtime could not convert an image with `method`, and could with gzip.
    pub(super) fn failed(&self, method: Method, message: String) {
        tracing::warn!(
            compression = method.name(),
            %message,
            "the runtime cannot compress images like this, so gzip is used for a day"
        );
        self.known().failed = Some(Failure::now(message));
    }

    /// Notes that the runtime of a compute node could not mount images with these compressions.
    pub(super) fn unread(&self, node: &str, compressions: &[String]) {
        let wanted = wanted(self.setting);
        let own = compressions.iter().any(|name| name == wanted.name());
        if wanted == Method::Gzip || !own {
            return;
        }
        let mut known = self.known();
        if known.unread.is_some() {
            return;
        }
        let node = shown(node);
        let next = if self.setting == Compression::Auto {
            "gzip is used for a day"
        } else {
            "the site file asks for it all the same"
        };
        tracing::warn!(%node, compression = wanted.name(), "the runtime of a compute node cannot mount images that are compressed like this; {next}");
        known.unread = Some(Failure::now(node));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [Compression; 4] = [
        Compression::Auto,
        Compression::Gzip,
        Compression::Zstd,
        Compression::Lz4,
    ];

    fn known(passes: Option<bool>, failed: bool, unread: bool) -> Known {
        Known {
            passes,
            failed: failed.then(|| Failure::now("no such compressor".to_owned())),
            unread: unread.then(|| Failure::now("n7".to_owned())),
        }
    }

    #[test]
    fn only_what_the_runtime_and_the_nodes_can_do_is_used() {
        let chosen = |known: Known| ALL.map(|setting| choose(setting, &known).name());
        assert_eq!(
            chosen(known(Some(true), false, false)),
            ["zstd", "gzip", "zstd", "lz4"]
        );
        // Who names a compression has decided for the nodes.
        assert_eq!(
            chosen(known(Some(true), false, true)),
            ["gzip", "gzip", "zstd", "lz4"]
        );
        for known in [
            known(None, false, false),
            known(Some(false), false, false),
            known(Some(true), true, false),
        ] {
            assert_eq!(chosen(known), ["gzip"; 4]);
        }
    }

    #[test]
    fn what_has_failed_counts_for_a_day() {
        let begin = Instant::now();
        for (failed, unread) in [(true, false), (false, true), (true, true)] {
            let mut known = known(Some(true), failed, unread);
            let before = known.clone();
            known.forget(begin + COUNTS / 2);
            assert_eq!(known, before);
            known.forget(Instant::now() + COUNTS);
            assert_eq!(choose(Compression::Auto, &known), Method::Zstd);
            assert_eq!(known.passes, Some(true), "the runtime is the same");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_failure_of_a_node_is_forgotten_and_noted_again() {
        let compressor = Compressor::new(Compression::Auto);
        compressor.known().passes = Some(true);
        let next = || choose(Compression::Auto, &compressor.known());
        for _ in 0..2 {
            compressor.unread("n7", &["zstd".to_owned()]);
            assert_eq!(next(), Method::Gzip);
            tokio::time::advance(COUNTS).await;
            assert_eq!(next(), Method::Zstd);
        }
    }

    #[test]
    fn gzip_is_converted_as_ever_and_the_rest_by_build() {
        let argv = |method: Method| method.argv("image.sif", "oci:layout").join("|");
        assert_eq!(
            argv(Method::Gzip),
            "pull|--disable-cache|--force|image.sif|oci:layout"
        );
        assert_eq!(
            argv(Method::Zstd),
            "build|--disable-cache|--force|--notest|--mksquashfs-args|-comp zstd -Xcompression-level 3|image.sif|oci:layout"
        );
        assert!(argv(Method::Lz4).contains("|--mksquashfs-args|-comp lz4|image.sif|"));
    }

    #[test]
    fn doctor_says_what_is_used_and_why_it_is_not_what_the_site_wants() {
        let well = |setting, known: Known| describe(setting, &known).0.is_ok();
        let none = known(Some(false), false, false);
        // Nothing is wrong with a runtime that is older.
        assert_eq!(
            ALL.map(|setting| well(setting, none.clone())),
            [true, true, false, false]
        );
        let able = known(Some(true), false, false);
        assert_eq!(ALL.map(|setting| well(setting, able.clone())), [true; 4]);
        for (known, words) in [
            (known(Some(true), true, false), "no such compressor"),
            (known(Some(true), false, true), "n7"),
            (known(None, false, false), "build --help"),
        ] {
            let (result, cure) = describe(Compression::Auto, &known);
            let what = result.unwrap_err();
            assert!(what.starts_with("gzip") && what.contains(words), "{what}");
            assert!(cure.contains("compression = \"gzip\""), "{cure}");
        }
    }

    #[test]
    fn a_node_counts_only_for_the_compression_that_is_wanted() {
        let after = |setting, compressions: &[&str]| {
            let compressor = Compressor::new(setting);
            compressor.known().passes = Some(true);
            let names: Vec<String> = compressions.iter().map(|&name| name.to_owned()).collect();
            compressor.unread("n1\u{1b}[2J", &names);
            compressor.unread("n2", &names);
            let unread = compressor.known().unread.clone();
            unread.map(|failure| failure.what)
        };
        // The name is shown in a terminal.
        let first = Some("n1\\u{1b}[2J".to_owned());
        assert_eq!(after(Compression::Auto, &["lz4", "zstd"]), first);
        assert_eq!(after(Compression::Lz4, &["lz4"]), first);
        assert_eq!(after(Compression::Auto, &["lz4"]), None);
        assert_eq!(after(Compression::Auto, &[]), None);
        assert_eq!(after(Compression::Gzip, &["gzip", "zstd"]), None);
    }
}
