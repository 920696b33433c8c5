//! PURE: the argv of `apptainer exec` and `singularity exec`. All differences between the two are here.
//!
//! - `--no-init`: KNoC's launcher, and so the program, is PID 1 of the container's PID namespace.
//! - `--no-eval`: no shell evaluates values (Apptainer only; it is given none in any case).
//! - `--no-mount`: `/tmp` and `/var/tmp` are the image's, with their content, if they are writable. `/etc/localtime` is
//!   the image's, too.
//! - A path with `,` or `:` is mounted with `--mount`, whose fields are CSV and can be quoted. So is an image, always the whole
//!   of it: the runtime would follow a link in the image to a file of the node. A folder of it is mounted later
//!   ([`crate::inside`]).
//! - The runtime takes a bind from below `/dev` to below `/dev` for a device and drops it, so its source gets another name.

use std::{
    borrow::Cow,
    ffi::{OsStr, OsString},
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
};

use super::{Bind, INSIDE, Root, Runtime, RuntimeError, Sandbox, Work};

/// A device that every container has with other runtimes, and that these two leave out of their `/dev`.
const FULL: &str = "/dev/full";

/// Which of the two programs it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Flavour {
    Apptainer,
    Singularity,
}

#[derive(Debug)]
pub(super) struct Apptainer {
    path: PathBuf,
    flavour: Flavour,
}

impl Apptainer {
    pub(super) fn new(path: &Path, flavour: Flavour) -> Self {
        Self {
            path: path.to_owned(),
            flavour,
        }
    }
}

impl Apptainer {
    /// The options that keep the host out of the container.
    fn isolation(&self, sandbox: &Sandbox) -> Vec<&'static str> {
        let mut options = if sandbox.shares_processes {
            // What the other option means, without a PID namespace.
            vec!["--contain", "--ipc"]
        } else {
            vec!["--containall"]
        };
        options.extend(["--no-init", "--no-home", "--cleanenv"]);
        if self.flavour == Flavour::Apptainer {
            options.push("--no-eval");
        }
        options
    }

    /// The option by which the files of the image are unpacked.
    fn unpacks(&self) -> &'static str {
        match self.flavour {
            Flavour::Apptainer => "--unsquash",
            Flavour::Singularity => "--tmp-sandbox",
        }
    }

    /// The options that decide what `/tmp` and `/var/tmp` are.
    fn temporary(&self, sandbox: &Sandbox) -> Result<Vec<OsString>, RuntimeError> {
        let mut argv = Vec::new();
        let mut left_out = Vec::new();
        match (&sandbox.root, &sandbox.work) {
            (_, None) | (Root::Overlay(_), Some(Work::Spare(_))) => left_out.push("tmp"),
            // A root in memory is too small for temporary files, and a read-only one takes none.
            (_, Some(Work::Spare(work) | Work::Needed(work))) => {
                argv.extend(["--workdir".into(), plain(work)?.to_owned()]);
            }
        }
        // Singularity's option does not take paths.
        if self.flavour == Flavour::Apptainer {
            left_out.push("/etc/localtime");
        }
        if !left_out.is_empty() {
            argv.extend(["--no-mount".into(), left_out.join(",").into()]);
        }
        Ok(argv)
    }
}

impl Runtime for Apptainer {
    fn name(&self) -> &'static str {
        match self.flavour {
            Flavour::Apptainer => "apptainer",
            Flavour::Singularity => "singularity",
        }
    }

    fn isolates(&self) -> bool {
        true
    }

    fn writable_roots(&self, overlay: &Path) -> Vec<Root> {
        match self.flavour {
            // In `--overlay` a colon would begin the options of the folder.
            Flavour::Apptainer if !overlay.as_os_str().as_bytes().contains(&b':') => {
                vec![
                    Root::Overlay(overlay.to_owned()),
                    Root::Memory,
                    Root::ReadOnly,
                ]
            }
            // Singularity's setuid starter accepts no folder from a user.
            Flavour::Apptainer | Flavour::Singularity => vec![Root::Memory, Root::ReadOnly],
        }
    }

    fn argv(&self, sandbox: &Sandbox) -> Result<Vec<OsString>, RuntimeError> {
        let mut argv: Vec<OsString> = vec![self.path.clone().into()];
        argv.extend(["--silent".into(), "exec".into()]);
        argv.extend(self.isolation(sandbox).into_iter().map(OsString::from));
        match &sandbox.root {
            Root::Overlay(folder) => argv.extend(["--overlay".into(), plain(folder)?.to_owned()]),
            Root::Memory => argv.push("--writable-tmpfs".into()),
            Root::ReadOnly => {}
        }
        argv.extend(self.temporary(sandbox)?);
        if sandbox.unpacked {
            argv.push(self.unpacks().into());
        }
        if sandbox.fakeroot {
            argv.push("--fakeroot".into());
        }
        // On a host without the driver's files these only cause a warning.
        if sandbox.gpus.nvidia {
            argv.push("--nv".into());
        }
        if sandbox.gpus.amd {
            argv.push("--rocm".into());
        }
        if !sandbox.hostname.is_empty() {
            argv.extend([
                "--uts".into(),
                "--hostname".into(),
                sandbox.hostname.clone().into(),
            ]);
        }
        // The launcher changes to the program's working directory.
        argv.extend(["--pwd".into(), "/".into()]);
        argv.extend(["--bind".into(), FULL.into()]);
        for bind in own_binds(sandbox).iter().chain(&sandbox.binds) {
            argv.extend(bind_option(bind)?);
        }
        argv.push(sandbox.image.clone().into());
        argv.extend([
            inside("agent").into(),
            "launch".into(),
            inside("launch.sock").into(),
        ]);
        Ok(argv)
    }
}

/// A file or folder of the launcher, in the container.
fn inside(name: &str) -> PathBuf {
    Path::new(INSIDE).join(name)
}

/// What the launcher needs in the container.
fn own_binds(sandbox: &Sandbox) -> [Bind; 2] {
    let bind = |source: &Path, target: PathBuf, read_only| Bind {
        source: source.to_owned(),
        target,
        read_only,
        image: None,
    };
    [
        bind(&sandbox.folder, INSIDE.into(), false),
        bind(&sandbox.agent, inside("agent"), true),
    ]
}

fn bind_option(bind: &Bind) -> Result<[OsString; 2], RuntimeError> {
    let source = no_device(bind);
    let (source, target) = (plain(&source)?, plain(&bind.target)?);
    let special = |path: &OsStr| path.as_bytes().iter().any(|byte| b",:\"\\".contains(byte));
    let mut value = OsString::new();
    if bind.image.is_some() || special(source) || special(target) {
        value.push("type=bind,");
        value.push(csv("source=", source));
        value.push(",");
        value.push(csv("destination=", target));
        if let Some(part) = bind.image {
            value.push(",image-src=/");
            if let Some(id) = part.id {
                value.push(format!(",id={id}"));
            }
        }
        if bind.read_only {
            value.push(",ro");
        }
        return Ok(["--mount".into(), value]);
    }
    value.push(source);
    value.push(":");
    value.push(target);
    if bind.read_only {
        value.push(":ro");
    }
    Ok(["--bind".into(), value])
}

/// The source of a bind, by a path that does not begin with `/dev` if the target's does.
fn no_device(bind: &Bind) -> Cow<'_, Path> {
    // The runtime compares the bytes, not the components.
    let below = |path: &Path| path.as_os_str().as_bytes().starts_with(b"/dev");
    if !below(&bind.source) || !below(&bind.target) {
        return Cow::Borrowed(&bind.source);
    }
    let mut source = OsString::from("/proc/self/root");
    source.push(&bind.source);
    Cow::Owned(source.into())
}

/// One CSV field, quoted whole.
fn csv(key: &str, path: &OsStr) -> OsString {
    let mut field = format!("\"{key}").into_bytes();
    for byte in path.as_bytes() {
        field.extend(if *byte == b'"' {
            &b"\"\""[..]
        } else {
            std::slice::from_ref(byte)
        });
    }
    field.push(b'"');
    OsStr::from_bytes(&field).to_owned()
}

/// Neither option syntax carries a line break; argv carries no NUL.
fn plain(path: &Path) -> Result<&OsStr, RuntimeError> {
    let bytes = path.as_os_str().as_bytes();
    if bytes.iter().any(|byte| b"\n\r\0".contains(byte)) {
        return Err(RuntimeError::Path(path.to_owned()));
    }
    Ok(path.as_os_str())
}

#[cfg(test)]
mod tests {
    use super::{super::Gpus, *};
    use crate::sif::Part;

    fn sandbox(binds: Vec<Bind>) -> Sandbox {
        Sandbox {
            image: "/images/a.sif".into(),
            agent: "/opt/knoc-agent".into(),
            folder: "/tmp/knoc-1/0".into(),
            binds,
            hostname: "pod".to_owned(),
            root: Root::Overlay("/tmp/knoc-1/0-root".into()),
            work: Some(Work::Spare("/tmp/knoc-1/0-work".into())),
            fakeroot: false,
            gpus: Gpus::default(),
            shares_processes: false,
            unpacked: false,
        }
    }

    fn bind(source: &str, target: &str) -> Bind {
        Bind {
            source: source.into(),
            target: target.into(),
            read_only: true,
            image: None,
        }
    }

    #[test]
    fn argv_by_flavour() {
        let argv = |flavour| {
            let runtime = Apptainer::new(Path::new("/usr/bin/x"), flavour);
            let argv = runtime.argv(&sandbox(vec![bind("/a b", "/c")])).unwrap();
            argv.iter()
                .map(|argument| argument.to_str().unwrap().to_owned())
                .collect::<Vec<_>>()
                .join("|")
        };
        assert_eq!(
            argv(Flavour::Apptainer),
            "/usr/bin/x|--silent|exec|--containall|--no-init|--no-home|--cleanenv|--no-eval|\
             --overlay|/tmp/knoc-1/0-root|--no-mount|tmp,/etc/localtime|--uts|--hostname|pod|--pwd|/|--bind|/dev/full|--bind|/tmp/knoc-1/0:/.knoc|--bind|\
             /opt/knoc-agent:/.knoc/agent:ro|--bind|/a b:/c:ro|/images/a.sif|/.knoc/agent|launch|\
             /.knoc/launch.sock"
        );
        assert!(!argv(Flavour::Singularity).contains("--no-eval"));
        let unpacked = |flavour| {
            let sandbox = Sandbox {
                unpacked: true,
                ..sandbox(Vec::new())
            };
            let runtime = Apptainer::new(Path::new("/usr/bin/x"), flavour);
            runtime.argv(&sandbox).unwrap()
        };
        assert!(unpacked(Flavour::Apptainer).contains(&"--unsquash".into()));
        assert!(unpacked(Flavour::Singularity).contains(&"--tmp-sandbox".into()));
        let shares = Sandbox {
            shares_processes: true,
            ..sandbox(Vec::new())
        };
        let runtime = Apptainer::new(Path::new("/usr/bin/x"), Flavour::Apptainer);
        let argv = runtime.argv(&shares).unwrap();
        assert_eq!(argv[3..5], ["--contain", "--ipc"]);
        assert!(!argv.contains(&"--containall".into()));
    }

    #[test]
    fn temporary_folders_are_the_images_if_they_are_writable() {
        let options = |flavour, root, work| {
            let sandbox = Sandbox {
                root,
                work,
                ..sandbox(Vec::new())
            };
            let runtime = Apptainer::new(Path::new("/usr/bin/x"), flavour);
            let options = runtime.temporary(&sandbox).unwrap();
            options.join(OsStr::new(" ")).into_string().unwrap()
        };
        let (new, old) = (Flavour::Apptainer, Flavour::Singularity);
        let overlay = || Root::Overlay("/o".into());
        let spare = || Some(Work::Spare("/w".into()));
        let in_work = "--workdir /w --no-mount /etc/localtime";
        for (flavour, root, work, wanted) in [
            (new, overlay(), spare(), "--no-mount tmp,/etc/localtime"),
            (new, overlay(), Some(Work::Needed("/w".into())), in_work),
            (new, Root::Memory, spare(), in_work),
            // The pod asks for a read-only root, which includes the folders, as with other runtimes.
            (new, Root::ReadOnly, None, "--no-mount tmp,/etc/localtime"),
            (old, Root::Memory, spare(), "--workdir /w"),
            (old, Root::ReadOnly, None, "--no-mount tmp"),
        ] {
            assert_eq!(options(flavour, root, work), wanted);
        }
    }

    #[test]
    fn a_volume_in_memory_is_no_device() {
        let option = |source: &str, target: &str| {
            let [_, value] = bind_option(&bind(source, target)).unwrap();
            value.into_string().unwrap()
        };
        assert_eq!(
            option("/dev/shm/v0", "/dev/shm"),
            "/proc/self/root/dev/shm/v0:/dev/shm:ro"
        );
        assert_eq!(option("/dev/shm/v0", "/data"), "/dev/shm/v0:/data:ro");
        assert_eq!(option("/tmp/v0", "/dev/shm"), "/tmp/v0:/dev/shm:ro");
    }

    #[test]
    fn gpus_are_seen_only_if_the_container_asks_for_them() {
        for (nvidia, amd, wanted) in [
            (false, false, &[][..]),
            (true, false, &["--nv"]),
            (false, true, &["--rocm"]),
        ] {
            let asked = Sandbox {
                gpus: Gpus { nvidia, amd },
                ..sandbox(Vec::new())
            };
            let runtime = Apptainer::new(Path::new("/usr/bin/x"), Flavour::Singularity);
            let mut argv = runtime.argv(&asked).unwrap();
            argv.retain(|word| word == "--nv" || word == "--rocm");
            assert_eq!(argv, wanted);
        }
    }

    #[test]
    fn paths_that_bind_cannot_carry_go_by_mount() {
        let [option, value] = bind_option(&bind("/a,\"b", "/c:d")).unwrap();
        assert_eq!(option, "--mount");
        assert_eq!(value, r#"type=bind,"source=/a,""b","destination=/c:d",ro"#);
        assert!(bind_option(&bind("/a\nb", "/c")).is_err());
        for (id, wanted) in [(Some(4), "image-src=/,id=4,ro"), (None, "image-src=/,ro")] {
            let image = Bind {
                image: Some(Part { id }),
                ..bind("/m0", "/models")
            };
            let [option, value] = bind_option(&image).unwrap();
            assert_eq!(option, "--mount");
            let wanted = format!(r#"type=bind,"source=/m0","destination=/models",{wanted}"#);
            assert_eq!(value.to_str(), Some(&*wanted));
        }
    }
}
