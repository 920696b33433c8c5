//! Whether the container runtime sets up containers as root. If it does, only root can join their
//! namespaces, and exec is not possible (ADR 0011). The answer comes from the installed files.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

/// The set-user-ID bit of a file's mode.
const SETUID: u32 = 0o4000;

/// The runtime's setuid starter, if one is installed and the runtime's configuration allows it.
/// `program` is the executable of the runtime called `name`.
#[must_use]
pub fn starter(name: &str, program: &Path) -> Option<PathBuf> {
    let program = fs::canonicalize(program).ok()?;
    let prefix = program.parent()?.parent()?;
    let starter = libraries(prefix)
        .map(|folder| folder.join(name).join("bin/starter-suid"))
        .find(|starter| is_setuid(starter))?;
    let etc = |root: &Path| root.join(name).join(format!("{name}.conf"));
    // Packages install the configuration below /etc, local builds below their own prefix.
    let configured = [etc(&prefix.join("etc")), etc(Path::new("/etc"))];
    let text = configured
        .iter()
        .find_map(|path| fs::read_to_string(path).ok());
    text.is_none_or(|text| allows(&text)).then_some(starter)
}

/// The folders in which a runtime may keep its own programs: local builds and most distributions
/// use `libexec`, Debian an architecture's library folder.
fn libraries(prefix: &Path) -> impl Iterator<Item = PathBuf> {
    let plain = ["libexec", "lib", "lib64"].map(|name| prefix.join(name));
    let entries = fs::read_dir(prefix.join("lib"));
    let entries = entries.into_iter().flatten().flatten();
    let architectures = entries.filter(|entry| {
        let name = entry.file_name();
        name.to_str().is_some_and(|name| name.contains("-linux-"))
    });
    plain
        .into_iter()
        .chain(architectures.map(|entry| entry.path()))
}

fn is_setuid(starter: &Path) -> bool {
    fs::metadata(starter).is_ok_and(|meta| meta.mode() & SETUID != 0 && meta.uid() == 0)
}

/// PURE: the value of `allow setuid` in `apptainer.conf` or `singularity.conf`. The default is yes.
fn allows(configuration: &str) -> bool {
    let mut said = configuration.lines().filter_map(|line| {
        let (key, value) = line.trim().split_once('=')?;
        (key.trim() == "allow setuid").then(|| value.trim() != "no")
    });
    said.next_back().unwrap_or(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_forbids_setuid_or_not() {
        for (text, expected) in [
            ("", true),
            ("# allow setuid = no\n", true),
            ("allow setuid = yes\n", true),
            ("allow setuid = no\n", false),
            ("  allow setuid=no", false),
            (
                "allow setuid = yes\nallow pid ns = no\nallow setuid = no",
                false,
            ),
        ] {
            assert_eq!(allows(text), expected, "{text:?}");
        }
    }

    #[test]
    fn a_starter_is_looked_for_where_distributions_put_it() {
        let root = tempfile::tempdir().unwrap();
        let prefix = root.path();
        for folder in ["lib/x86_64-linux-gnu", "lib/python3"] {
            fs::create_dir_all(prefix.join(folder)).unwrap();
        }
        let found: Vec<PathBuf> = libraries(prefix).collect();
        let expected = ["libexec", "lib", "lib64", "lib/x86_64-linux-gnu"];
        assert_eq!(found, expected.map(|folder| prefix.join(folder)));
    }

    #[test]
    fn a_runtime_without_a_setuid_starter_has_none() {
        let root = tempfile::tempdir().unwrap();
        let bin = root.path().join("bin");
        let libexec = root.path().join("libexec/apptainer/bin");
        fs::create_dir_all(&bin).unwrap();
        fs::create_dir_all(&libexec).unwrap();
        let program = bin.join("apptainer");
        fs::File::create(&program).unwrap();
        assert_eq!(starter("apptainer", &program), None);
        // The file exists, but has no setuid bit.
        fs::File::create(libexec.join("starter-suid")).unwrap();
        assert_eq!(starter("apptainer", &program), None);
        assert_eq!(starter("apptainer", &bin.join("none")), None);
    }
}
