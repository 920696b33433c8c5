//! Does the container runtime set containers up as root? Then nobody but root joins their namespaces, and exec is not
//! possible (ADR 0011). Found from what is installed; PURE but for looking at files.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

/// Set-user-ID on execution.
const SETUID: u32 = 0o4000;

/// The runtime's setuid starter, where it has one and its configuration does not forbid its use. `program` is the
/// executable of the runtime called `name`.
#[must_use]
pub fn starter(name: &str, program: &Path) -> Option<PathBuf> {
    let program = fs::canonicalize(program).ok()?;
    let prefix = program.parent()?.parent()?;
    let starter = prefix.join("libexec").join(name).join("bin/starter-suid");
    let meta = fs::metadata(&starter).ok()?;
    if meta.mode() & SETUID == 0 || meta.uid() != 0 {
        return None;
    }
    let etc = |root: &Path| root.join(name).join(format!("{name}.conf"));
    // Packages put it below /etc, builds below their own prefix.
    let configured = [etc(&prefix.join("etc")), etc(Path::new("/etc"))];
    let text = configured
        .iter()
        .find_map(|path| fs::read_to_string(path).ok());
    text.is_none_or(|text| allows(&text)).then_some(starter)
}

/// PURE: `allow setuid` of `apptainer.conf` or `singularity.conf`; it is on where nothing is said.
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
    fn a_runtime_without_a_setuid_starter_has_none() {
        let root = tempfile::tempdir().unwrap();
        let bin = root.path().join("bin");
        let libexec = root.path().join("libexec/apptainer/bin");
        fs::create_dir_all(&bin).unwrap();
        fs::create_dir_all(&libexec).unwrap();
        let program = bin.join("apptainer");
        fs::File::create(&program).unwrap();
        assert_eq!(starter("apptainer", &program), None);
        // There, but without the bit.
        fs::File::create(libexec.join("starter-suid")).unwrap();
        assert_eq!(starter("apptainer", &program), None);
        assert_eq!(starter("apptainer", &bin.join("none")), None);
    }
}
