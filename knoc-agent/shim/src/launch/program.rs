//! Turns this process, which runs inside the container, into the program: session, stdio, terminal, limits, working
//! directory, signals, and then `execve`.

use std::{
    ffi::{CString, OsStr},
    fs::{self, DirBuilder},
    io::{self, Read as _},
    os::{
        fd::{AsFd as _, AsRawFd as _, OwnedFd},
        unix::{
            ffi::{OsStrExt as _, OsStringExt as _},
            fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _},
            net::UnixStream,
        },
    },
    path::{Path, PathBuf},
    process::ExitCode,
};

use knoc_contract::launch::{LaunchSpec, MAX_SPEC, MESSAGE, Reply, VOLUMES};
use rustix::{
    fs::{Access, access},
    io::Errno,
    process::{ioctl_tiocsctty, setsid, umask},
    stdio::{dup2_stderr, dup2_stdin, dup2_stdout},
};

use super::{account, fds, ids, limits, pty, sys};

/// Exit codes as a shell uses them: the program cannot be executed, or was not found.
const CANNOT_EXECUTE: u8 = 126;
const NOT_FOUND: u8 = 127;

/// Where the termination message is unless the pod says something else.
const DEFAULT_MESSAGE: &str = "/dev/termination-log";

const DEFAULT_PATH: &[u8] = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Why the program did not start; sent to the shim as [`Reply::Failed`].
#[derive(Debug)]
struct Failure {
    errno: i32,
    what: String,
}

impl Failure {
    fn on(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |error| Self {
            errno: error.raw_os_error().unwrap_or_default(),
            what: format!("{what}: {error}"),
        }
    }
}

/// Receives the specification from `shim` and becomes the program. Returns only on failure, which it has reported to the
/// shim.
pub(super) fn run(shim: &UnixStream) -> ExitCode {
    let Err(failure) = receive(shim).and_then(|(spec, stdio)| start(shim, &spec, stdio));
    let code = if failure.errno == Errno::NOENT.raw_os_error() {
        NOT_FOUND
    } else {
        CANNOT_EXECUTE
    };
    let reply = Reply::Failed {
        errno: failure.errno,
        what: failure.what,
    };
    // If the shim has ended, nobody receives the reply.
    fds::send(shim, &reply.encode(), &[]).ok();
    ExitCode::from(code)
}

fn receive(mut shim: &UnixStream) -> Result<(LaunchSpec, Vec<OwnedFd>), Failure> {
    let wire = |what: &str| Failure {
        errno: 0,
        what: what.to_owned(),
    };
    let mut head = [0_u8; 4];
    let mut stdio = Vec::new();
    let mut got = 0;
    while got < head.len() {
        let more = fds::receive(shim, head.get_mut(got..).unwrap_or_default(), &mut stdio)
            .map_err(io::Error::from)
            .map_err(Failure::on("receive the launch specification"))?;
        if more == 0 {
            return Err(wire("the shim closed the launch socket"));
        }
        got += more;
    }
    let length = usize::try_from(u32::from_be_bytes(head)).unwrap_or(usize::MAX);
    if length > MAX_SPEC {
        return Err(wire("the launch specification is too long"));
    }
    let mut body = vec![0; length];
    shim.read_exact(&mut body)
        .map_err(Failure::on("receive the launch specification"))?;
    let spec = LaunchSpec::decode(&body).map_err(|error| wire(&error.to_string()))?;
    Ok((spec, stdio))
}

fn start(
    shim: &UnixStream,
    spec: &LaunchSpec,
    stdio: Vec<OwnedFd>,
) -> Result<std::convert::Infallible, Failure> {
    // Fails if the process leads a group already (as PID 1 of a new namespace may): it then leads a session, too.
    setsid().ok();
    let (stdio, passed) = split_passed(spec, stdio)?;
    attach_stdio(shim, spec, stdio)?;
    umask(rustix::fs::Mode::from_raw_mode(0o022));
    limits::set();
    let shown = shown_ids(shim, spec);
    prepare_files(spec, shown)?;
    let mut env = with_home(spec);
    if let Some(shown) = shown {
        ids::show(shown)
            .and_then(|()| ids::drop_capabilities())
            .map_err(Failure::on("enter the program's user namespace"))?;
        // The change of credentials may have reset it.
        super::die_with_parent();
    }
    env.extend(passed.as_ref().map(|passed| passed.variable.clone()));
    change_directory(spec)?;
    let program = resolve(
        spec.argv.first().map_or(&[][..], Vec::as_slice),
        path_of(&env),
    )?;
    let quoted = quote(program.as_os_str().as_bytes());
    let failure = |what: &str| Failure {
        errno: 22,
        what: format!("exec: {quoted}: {what}"),
    };
    let argv = c_strings(&spec.argv).ok_or_else(|| failure("NUL byte in argv"))?;
    let env = c_strings(&env).ok_or_else(|| failure("NUL byte in the environment"))?;
    let path = CString::new(program.into_os_string().into_vec())
        .map_err(|_| failure("NUL byte in the path"))?;
    // If the shim has ended, this process ends as well.
    fds::send(shim, &Reply::Ids(ids::seen()).encode(), &[]).ok();
    sys::close_on_exec();
    if let Some(passed) = &passed {
        rustix::io::fcntl_setfd(&passed.fd, rustix::io::FdFlags::empty())
            .map_err(|errno| Failure::on("keep a descriptor open")(errno.into()))?;
    }
    sys::reset_signals();
    let Err(errno) = nix::unistd::execve(&path, &argv, &env);
    Err(Failure {
        errno: errno as i32,
        what: format!("exec: {quoted}: {}", message_of(errno)),
    })
}

/// The ids that the program is to see itself as. If it cannot, the shim is told, and the program keeps those that it has.
fn shown_ids(shim: &UnixStream, spec: &LaunchSpec) -> Option<[u32; 2]> {
    let (uid, gid) = (spec.uid, spec.gid);
    if uid.is_none() && gid.is_none() {
        return None;
    }
    let ids = account::ids(uid, gid, spec.passwd.as_deref());
    if ids::can_show(ids) {
        return Some(ids);
    }
    // If the shim has ended, this process ends as well.
    fds::send(shim, &Reply::OwnIds.encode(), &[]).ok();
    None
}

/// A descriptor that the program keeps, and the variable with its number.
struct Passed {
    fd: OwnedFd,
    variable: Vec<u8>,
}

/// Takes the descriptor that the program keeps, which comes last, from those of the specification.
fn split_passed(
    spec: &LaunchSpec,
    mut stdio: Vec<OwnedFd>,
) -> Result<(Vec<OwnedFd>, Option<Passed>), Failure> {
    let Some(name) = &spec.descriptor else {
        return Ok((stdio, None));
    };
    let fd = stdio.pop().ok_or_else(|| Failure {
        errno: 0,
        what: "a descriptor for the program is missing".to_owned(),
    })?;
    let variable = [name.as_slice(), b"=", fd.as_raw_fd().to_string().as_bytes()].concat();
    Ok((stdio, Some(Passed { fd, variable })))
}

/// The error text as Go writes it, in lower case, which users know from `kubectl describe`.
fn message_of(errno: nix::errno::Errno) -> String {
    errno.desc().to_lowercase()
}

fn path_from(bytes: &[u8]) -> &Path {
    Path::new(OsStr::from_bytes(bytes))
}

fn quote(bytes: &[u8]) -> String {
    format!("{:?}", String::from_utf8_lossy(bytes))
}

fn c_strings(list: &[Vec<u8>]) -> Option<Vec<CString>> {
    list.iter()
        .map(|item| CString::new(item.as_slice()).ok())
        .collect()
}

fn attach_stdio(shim: &UnixStream, spec: &LaunchSpec, stdio: Vec<OwnedFd>) -> Result<(), Failure> {
    let on = |what: &'static str| move |errno: Errno| Failure::on(what)(io::Error::from(errno));
    if let Some(window) = spec.tty {
        let (master, slave) = pty::open_pair(window).map_err(on("open a terminal"))?;
        fds::send(shim, &Reply::Master.encode(), &[master.as_fd()])
            .map_err(on("send the terminal"))?;
        ioctl_tiocsctty(&slave).map_err(on("set the controlling terminal"))?;
        dup2_stdin(&slave).map_err(on("attach the terminal"))?;
        dup2_stdout(&slave).map_err(on("attach the terminal"))?;
        return dup2_stderr(&slave).map_err(on("attach the terminal"));
    }
    let [input, output, errors]: [OwnedFd; 3] = stdio.try_into().map_err(|_| Failure {
        errno: 0,
        what: "three stdio descriptors expected".to_owned(),
    })?;
    dup2_stdin(&input).map_err(on("attach standard input"))?;
    dup2_stdout(&output).map_err(on("attach standard output"))?;
    dup2_stderr(&errors).map_err(on("attach standard error"))
}

fn path_of(env: &[Vec<u8>]) -> &[u8] {
    env.iter()
        .rev()
        .find_map(|entry| entry.strip_prefix(b"PATH="))
        .unwrap_or(DEFAULT_PATH)
}

/// Creates what a container has besides the image's files. Best effort: if something cannot be created, the program runs
/// without it, unless it is a volume.
fn prepare_files(spec: &LaunchSpec, ids: Option<[u32; 2]>) -> Result<(), Failure> {
    for folder in &spec.temporary {
        open_to_all(path_from(folder));
    }
    for [name, target] in spec.links.as_chunks::<2>().0 {
        prepare_link(path_from(name), path_from(target))?;
    }
    if let Some(user) = spec.user.as_ref().filter(|_| spec.settle) {
        account::settle(user, spec.passwd.as_deref(), ids);
    }
    Ok(())
}

/// Creates a link, or looks for the termination message, as the specification says.
fn prepare_link(name: &Path, target: &Path) -> Result<(), Failure> {
    let done = if target.as_os_str().is_empty() || target == Path::new(MESSAGE) {
        check_message(name, target)
    } else {
        link(name, target)
    };
    let quoted = quote(name.as_os_str().as_bytes());
    let what = if target.starts_with(VOLUMES) {
        format!(
            "mount a volume at {quoted}, which the container runtime does not allow (choose another mountPath)"
        )
    } else if name == Path::new(DEFAULT_MESSAGE) {
        // Nobody asked for it.
        return Ok(());
    } else {
        format!("use terminationMessagePath {quoted} (choose another path)")
    };
    done.map_err(Failure::on(what))
}

/// Checks that the program can write its termination message at `name`, and that it is the file `target`, if that is given: the
/// runtime may have left out the mount.
fn check_message(name: &Path, target: &Path) -> io::Result<()> {
    let found = fs::metadata(name)?;
    if found.is_dir() {
        return Err(io::ErrorKind::IsADirectory.into());
    }
    let differs = |own: fs::Metadata| (own.dev(), own.ino()) != (found.dev(), found.ino());
    if fs::metadata(target).is_ok_and(differs) {
        return Err(io::Error::other("the container runtime has not mounted it"));
    }
    Ok(access(name, Access::WRITE_OK)?)
}

/// Creates a link. A file that exists already stays.
fn link(name: &Path, target: &Path) -> io::Result<()> {
    if let Some(parent) = name.parent() {
        make_folders(parent, 0o755);
    }
    match std::os::unix::fs::symlink(target, name) {
        Err(_) if fs::read_link(name).is_ok_and(|found| found == target) => Ok(()),
        linked => linked,
    }
}

fn make_folders(folder: &Path, mode: u32) {
    drop(DirBuilder::new().recursive(true).mode(mode).create(folder));
}

/// Makes a temporary folder writable for every user, whatever mode it has from the image or from a mount below it.
fn open_to_all(folder: &Path) {
    make_folders(folder, 0o777);
    let sticky = 0o1777;
    let mode = |meta: fs::Metadata| meta.permissions().mode() & 0o7777;
    if fs::metadata(folder).is_ok_and(|meta| meta.is_dir() && mode(meta) != sticky) {
        drop(fs::set_permissions(
            folder,
            fs::Permissions::from_mode(sticky),
        ));
    }
}

/// The environment, with HOME added as container runtimes do it if neither the image nor the pod sets it.
fn with_home(spec: &LaunchSpec) -> Vec<Vec<u8>> {
    let env = &spec.env;
    let is_home = |entry: &[u8]| entry.starts_with(b"HOME=");
    let last = env.iter().rev().find(|entry| is_home(entry));
    // An empty HOME counts as unset.
    if last.is_some_and(|entry| entry != b"HOME=") {
        return env.clone();
    }
    let home = account::home(spec.user.as_deref(), spec.passwd.as_deref());
    let home = [b"HOME=", home.as_slice()].concat();
    let others = env.iter().filter(|entry| !is_home(entry)).cloned();
    others.chain([home]).collect()
}

fn change_directory(spec: &LaunchSpec) -> Result<(), Failure> {
    let cwd = path_from(&spec.cwd);
    if spec.create_cwd && !cwd.exists() {
        // If the root is read-only, chdir below reports the error.
        drop(DirBuilder::new().recursive(true).mode(0o755).create(cwd));
    }
    std::env::set_current_dir(cwd)
        .map_err(Failure::on(format!("chdir to cwd ({})", quote(&spec.cwd))))
}

/// Finds the program as runc does: a name with a slash is a path, any other is looked up in `path`.
fn resolve(program: &[u8], path: &[u8]) -> Result<PathBuf, Failure> {
    let failed = |errno: Errno, what: String| Failure {
        errno: errno.raw_os_error(),
        what,
    };
    let quoted = quote(program);
    if program.is_empty() {
        return Err(failed(
            Errno::NOENT,
            "exec: no command specified".to_owned(),
        ));
    }
    if program.contains(&b'/') {
        let found = PathBuf::from(OsStr::from_bytes(program));
        return match executable(&found) {
            Ok(()) => Ok(found),
            Err(error) => {
                let errno = error.raw_os_error().unwrap_or(Errno::ACCESS.raw_os_error());
                let message = message_of(nix::errno::Errno::from_raw(errno));
                let what = if error.kind() == io::ErrorKind::NotFound {
                    format!("exec: {quoted}: stat {}: {message}", found.display())
                } else {
                    format!("exec: {quoted}: {message}")
                };
                Err(Failure { errno, what })
            }
        };
    }
    let mut denied = false;
    for folder in path
        .split(|byte| *byte == b':')
        .filter(|folder| !folder.is_empty())
    {
        let candidate = path_from(folder).join(OsStr::from_bytes(program));
        match executable(&candidate) {
            Ok(()) => return Ok(candidate),
            Err(error) => denied |= error.kind() == io::ErrorKind::PermissionDenied,
        }
    }
    if denied {
        return Err(failed(
            Errno::ACCESS,
            format!("exec: {quoted}: permission denied"),
        ));
    }
    Err(failed(
        Errno::NOENT,
        format!("exec: {quoted}: executable file not found in $PATH"),
    ))
}

fn executable(path: &Path) -> io::Result<()> {
    let metadata = fs::metadata(path)?;
    if metadata.is_dir() {
        return Err(Errno::ISDIR.into());
    }
    if metadata.permissions().mode() & 0o111 == 0 {
        return Err(Errno::ACCESS.into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_is_found_as_runc_finds_it() {
        let folder = tempfile::tempdir().unwrap();
        let plain = folder.path().join("plain");
        fs::File::create(&plain).unwrap();
        let path = [folder.path().as_os_str().as_bytes(), b"::/bin"].concat();
        assert_eq!(resolve(b"sh", &path).unwrap(), Path::new("/bin/sh"));
        assert_eq!(resolve(b"/bin/sh", b"").unwrap(), Path::new("/bin/sh"));
        let failure = resolve(b"plain", &path).unwrap_err();
        assert_eq!(
            (failure.errno, failure.what.as_str()),
            (13, "exec: \"plain\": permission denied")
        );
        let failure = resolve(b"no-such-program", &path).unwrap_err();
        assert_eq!(failure.errno, 2);
        assert_eq!(
            failure.what,
            "exec: \"no-such-program\": executable file not found in $PATH"
        );
        let failure = resolve(b"/no/such", &path).unwrap_err();
        assert_eq!(
            failure.what,
            "exec: \"/no/such\": stat /no/such: no such file or directory"
        );
        assert_eq!(resolve(b"/bin", &path).unwrap_err().errno, 21);
    }

    #[test]
    fn a_volume_and_a_termination_message_that_is_asked_for_need_their_links() {
        let folder = tempfile::tempdir().unwrap();
        let device = folder.path().join("device");
        fs::File::create(&device).unwrap();
        let prepare = |name: &Path, target: &[u8]| {
            let spec = LaunchSpec {
                links: vec![name.as_os_str().as_bytes().to_vec(), target.to_vec()],
                ..LaunchSpec::default()
            };
            prepare_files(&spec, None)
        };
        let failure = prepare(&device, b"/.knoc/dev/0").unwrap_err();
        let quoted = quote(device.as_os_str().as_bytes());
        let wanted = format!("mount a volume at {quoted}, ");
        assert!(failure.what.starts_with(&wanted), "{failure:?}");
        assert!(failure.what.contains("File exists"), "{failure:?}");
        let failure = prepare(&device.join("below"), b"/.knoc/dev/0").unwrap_err();
        assert!(failure.what.contains("Not a directory"), "{failure:?}");
        let failure = prepare(&device, b"/.knoc/termination-log").unwrap_err();
        assert!(
            failure.what.contains("terminationMessagePath"),
            "{failure:?}"
        );
        // The default one may be missing.
        prepare(Path::new(DEFAULT_MESSAGE), b"").unwrap();
        let free = folder.path().join("a/b");
        for _ in 0..2 {
            prepare(&free, b"/.knoc/dev/1").unwrap();
        }
        assert_eq!(fs::read_link(&free).unwrap(), Path::new("/.knoc/dev/1"));
    }

    #[test]
    fn a_termination_message_is_a_writable_file_which_the_shim_reads() {
        let base = tempfile::tempdir().unwrap();
        let at = |name: &str| base.path().join(name);
        let (own, other) = (at("own"), at("other"));
        fs::File::create(&own).unwrap();
        fs::File::create(&other).unwrap();
        fs::hard_link(&own, at("mounted")).unwrap();
        let none = Path::new("");
        check_message(&at("mounted"), &own).unwrap();
        check_message(&other, none).unwrap();
        for (name, target, expected) in [
            (base.path().to_owned(), none, "is a directory"),
            (own.join("below"), none, "Not a directory"),
            (at("missing"), none, "No such file"),
            (other, &*own, "has not mounted it"),
        ] {
            let error = check_message(&name, target).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn home_is_set_unless_the_image_or_the_pod_sets_it() {
        let passwd = b"root:x:0:0::/root:/bin/sh\n";
        let home = b"HOME=/root";
        let env = |entries: &[&[u8]]| -> Vec<Vec<u8>> {
            entries.iter().map(|entry| entry.to_vec()).collect()
        };
        for (given, wanted) in [
            (env(&[b"A=1"]), env(&[b"A=1", home])),
            (env(&[b"HOME=", b"A=1"]), env(&[b"A=1", home])),
            (env(&[b"HOME=/own"]), env(&[b"HOME=/own"])),
            (env(&[b"HOMES=x"]), env(&[b"HOMES=x", home])),
        ] {
            let spec = LaunchSpec {
                env: given,
                user: Some(b"0".to_vec()),
                passwd: Some(passwd.to_vec()),
                ..LaunchSpec::default()
            };
            assert_eq!(with_home(&spec), wanted);
        }
    }

    #[test]
    fn temporary_folders_are_writable_for_every_user() {
        let base = tempfile::tempdir().unwrap();
        let (old, new) = (base.path().join("old"), base.path().join("a/new"));
        fs::create_dir(&old).unwrap();
        for folder in [&old, &new] {
            open_to_all(folder);
            let mode = fs::metadata(folder).unwrap().permissions().mode();
            assert_eq!(mode & 0o7777, 0o1777, "{}", folder.display());
        }
    }

    #[test]
    fn the_last_path_wins() {
        let env = [b"PATH=/a".to_vec(), b"X=1".to_vec(), b"PATH=/b".to_vec()];
        assert_eq!(path_of(&env), b"/b");
        assert_eq!(path_of(&env[1..2]), DEFAULT_PATH);
    }
}
