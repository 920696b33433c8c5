//! PURE: how a container's program is started (argv, environment, working directory, hosts file), and where its
//! termination message is found.

use std::{
    borrow::Cow,
    fmt::Write as _,
    path::{Path, PathBuf},
};

use knoc_contract::launch::{LaunchSpec, Window};
use knoc_proto::{
    expand::{self, Known, RuntimeFields, SubPathError},
    paths, pb,
    pod::Hostname,
};

use super::{egress::ApiServer, gpus};
use crate::{
    launch::account,
    runtime::{Gpus, INSIDE},
};

const DEFAULT_PATH: &[u8] = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const TERMINATION_LOG: &str = "/dev/termination-log";

/// The size of a terminal that nobody has attached to yet.
const TERMINAL: Window = Window { cols: 80, rows: 24 };

/// What is the same for all containers of a pod.
#[derive(Debug, Clone, Default)]
pub(crate) struct Facts {
    /// The pod's host names.
    pub(crate) hostname: Hostname,
    /// The addresses of the pod, which are known only on the node.
    pub(crate) fields: RuntimeFields,
    /// The job's variables by which Slurm says which GPUs it chose.
    pub(crate) devices: Vec<(String, String)>,
    /// Whether the runtime binds the GPU driver's libraries into the container.
    pub(crate) binds_libraries: bool,
    /// Whether containers have a root of their own, with the image's `/etc/passwd`.
    pub(crate) isolated: bool,
    /// How containers in the node's network reach the API server.
    pub(crate) api: Option<ApiServer>,
}

/// What the launcher is told to run.
pub(crate) fn launch_spec(
    container: &pb::Container,
    image: &pb::ImageConfig,
    values: &pb::PodValues,
    facts: &Facts,
) -> LaunchSpec {
    let vars = &variables(container, values, facts);
    let gpus = gpus::asked(container);
    let mut given = image.env.clone();
    given.extend(gpus::variables(gpus, &facts.devices));
    let mut env = expand::environment(&given, vars, &facts.fields);
    if facts.binds_libraries && gpus != Gpus::default() {
        gpus::search_libraries(&mut env);
    }
    let mut default = |name: &[u8], value: &[u8]| {
        if !env.iter().any(|(known, _)| known == name) {
            env.push((name.to_vec(), value.to_vec()));
        }
    };
    default(b"PATH", DEFAULT_PATH);
    default(b"HOSTNAME", facts.hostname.kernel.as_bytes());
    if container.tty {
        default(b"TERM", b"xterm");
    }
    let cwd = [&container.working_dir, &image.working_dir]
        .into_iter()
        .find(|dir| !dir.is_empty());
    LaunchSpec {
        argv: argv(
            container,
            image,
            &expand::pod_environment(vars, &facts.fields),
        ),
        env: env
            .into_iter()
            .map(|(name, value)| [name, value].join(&b'='))
            .collect(),
        cwd: cwd.map_or_else(|| b"/".to_vec(), |dir| dir.as_bytes().to_vec()),
        create_cwd: true,
        tty: container.tty.then_some(TERMINAL),
        links: Vec::new(),
        temporary: Vec::new(),
        user: facts.isolated.then(|| user(container, image)),
        passwd: None,
        settle: false,
        descriptor: None,
        uid: None,
        gid: None,
    }
}

/// PURE: the user and the group that the program is to see itself as: those of the pod, else those of the image. The number of a name is
/// that in the image's own files: the text of `passwd`, and the number of the group that the image names. An image whose user is root
/// does not ask for it: most images only do not name another one, and what they start as root wants rights that nobody can give it
/// here.
pub(crate) fn ids(
    container: &pb::Container,
    image: &pb::ImageConfig,
    (passwd, named): (Option<&[u8]>, Option<u32>),
) -> [Option<u32>; 2] {
    let id = |id: Option<i64>| id.and_then(|id| u32::try_from(id).ok());
    let gid = id(container.run_as_group);
    if container.run_as_user.is_some() {
        return [id(container.run_as_user), gid];
    }
    let group = image.user.split_once(':').map_or("", |(_, group)| group);
    let uid = account::uid_of(passwd.unwrap_or_default(), image.user.as_bytes());
    match uid {
        Some(1..) => [uid, gid.or_else(|| group.parse().ok()).or(named)],
        Some(0) | None => [None, gid],
    }
}

/// The variables that the pod gives to the container.
pub(crate) fn variables<'a>(
    container: &pb::Container,
    values: &'a pb::PodValues,
    facts: &Facts,
) -> Cow<'a, [pb::EnvVar]> {
    let mut all = values.env.iter().chain(&values.ephemeral_env);
    let own = all.find(|env| env.container == container.name);
    let vars = own.map_or(&[][..], |env| &env.vars);
    match facts.api {
        None => vars.into(),
        Some(api) => api.redirect(vars).into(),
    }
}

/// The container's mounts, each `subPathExpr` expanded to a path.
pub(crate) fn mounts(
    container: &pb::Container,
    values: &pb::PodValues,
    facts: &Facts,
) -> Result<Vec<pb::Mount>, SubPathError> {
    let env = expand::pod_environment(&variables(container, values, facts), &facts.fields);
    let known = Known::of(&env);
    let expanded = |mount: &pb::Mount| {
        let mut mount = mount.clone();
        let template = std::mem::take(&mut mount.sub_path_expr);
        if !template.is_empty() {
            mount.sub_path = expand::sub_path(&template, &known)?;
        }
        Ok(mount)
    };
    container.mounts.iter().map(expanded).collect()
}

/// The user whose home folder the program has: the pod's `runAsUser`, else the image's user, else root.
fn user(container: &pb::Container, image: &pb::ImageConfig) -> Vec<u8> {
    let of_pod = container.run_as_user.map(|uid| uid.to_string());
    let user = of_pod.unwrap_or_else(|| image.user.clone());
    if user.is_empty() {
        b"0".to_vec()
    } else {
        user.into_bytes()
    }
}

/// Kubernetes' rule: `command` replaces the image's entrypoint and its cmd, `args` replace its cmd only.
fn argv(
    container: &pb::Container,
    image: &pb::ImageConfig,
    env: &[expand::Variable],
) -> Vec<Vec<u8>> {
    let literal = |list: &[String]| list.iter().map(|item| item.clone().into_bytes()).collect();
    let mut argv: Vec<Vec<u8>> = if container.command.is_empty() {
        literal(&image.entrypoint)
    } else {
        expand::argv(&container.command, env)
    };
    if !container.args.is_empty() {
        argv.extend(expand::argv(&container.args, env));
    } else if container.command.is_empty() {
        argv.extend::<Vec<Vec<u8>>>(literal(&image.cmd));
    }
    argv
}

/// The text of `/etc/hosts`: the node's entries, then the pod's name and aliases.
pub(crate) fn hosts(node: &str, facts: &Facts, aliases: &[pb::HostAlias]) -> String {
    let mut text = node.trim_end().to_owned();
    text.push_str("\n\n# Entries added by KNoC.\n");
    // Writing to a string cannot fail.
    let Hostname {
        short, qualified, ..
    } = &facts.hostname;
    if !short.is_empty() && !facts.fields.pod_ip.is_empty() {
        let names = qualified.iter().chain([short]);
        let names: Vec<_> = names.map(String::as_str).collect();
        writeln!(text, "{}\t{}", facts.fields.pod_ip, names.join("\t")).ok();
    }
    if facts.api.is_some() {
        writeln!(text, "{}", ApiServer::hosts_line()).ok();
    }
    for alias in aliases {
        writeln!(text, "{}\t{}", alias.ip, alias.hostnames.join("\t")).ok();
    }
    text
}

/// How the shim gets a container's termination message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum TerminationLog {
    /// Its path lies in a mount: the file is created and read there.
    Mounted {
        path: PathBuf,
        /// The index of its mount.
        mount: usize,
        /// The path of the file in that mount.
        rest: PathBuf,
    },
    /// Nothing can be mounted below `/dev`: a link leads to a file in `/.knoc`.
    Link { name: String, target: PathBuf },
    /// A file of the shim is mounted at this path.
    Bind(PathBuf),
}

/// Decides by the path of the message, and by what is `mounted` above it already, which may be read-only: the file is then mounted
/// over that.
pub(crate) fn termination_log(
    container: &pb::Container,
    mounted: &[(&Path, bool)],
) -> TerminationLog {
    // The path was checked when the agent accepted the pod.
    let path = paths::in_container(&container.termination_message_path)
        .unwrap_or_else(|_| TERMINATION_LOG.to_owned());
    let path = Path::new(&path);
    let longest = mounted
        .iter()
        .enumerate()
        .filter_map(|(mount, above)| Some((mount, above, path.strip_prefix(above.0).ok()?)))
        .max_by_key(|(_, above, _)| above.0.components().count());
    if let Some((mount, (_, read_only), rest)) = longest {
        if *read_only && !rest.as_os_str().is_empty() {
            return TerminationLog::Bind(path.to_owned());
        }
        let (path, rest) = (path.to_owned(), rest.to_owned());
        return TerminationLog::Mounted { path, mount, rest };
    }
    if path.starts_with("/dev") && path != Path::new("/dev") {
        let name = path.to_string_lossy().into_owned();
        let target = Path::new(INSIDE).join("termination-log");
        return TerminationLog::Link { name, target };
    }
    TerminationLog::Bind(path.to_owned())
}

#[cfg(test)]
mod tests {
    use knoc_proto::pod::{PodSpec, PodValues};

    use super::*;

    fn hostname(name: &str) -> Hostname {
        Hostname {
            short: name.to_owned(),
            qualified: None,
            kernel: name.to_owned(),
        }
    }

    fn strings(list: &[&str]) -> Vec<String> {
        list.iter().map(|item| (*item).to_owned()).collect()
    }

    #[test]
    fn command_and_args_replace_entrypoint_and_cmd_of_the_image() {
        let image = pb::ImageConfig {
            entrypoint: strings(&["/entry", "$(X)"]),
            cmd: strings(&["c"]),
            ..Default::default()
        };
        let run = |command: &[&str], args: &[&str]| {
            let container = pb::Container {
                command: strings(command),
                args: strings(args),
                ..Default::default()
            };
            let argv = argv(&container, &image, &[(b"X".to_vec(), b"1".to_vec())]);
            argv.iter()
                .map(|word| String::from_utf8_lossy(word).into_owned())
                .collect::<Vec<_>>()
        };
        assert_eq!(run(&[], &[]), ["/entry", "$(X)", "c"]);
        assert_eq!(run(&[], &["a$(X)"]), ["/entry", "$(X)", "a1"]);
        assert_eq!(run(&["b"], &[]), ["b"]);
        assert_eq!(run(&["b"], &["a"]), ["b", "a"]);
    }

    #[test]
    fn a_sub_path_comes_from_the_containers_variables() {
        let var = |name: &str, value| pb::EnvVar {
            name: name.to_owned(),
            value: Some(value),
        };
        let host_ip = pb::env_var::Value::Runtime(pb::RuntimeField::HostIp.into());
        let vars = vec![
            var("NAME", pb::env_var::Value::Literal(b"foo".to_vec().into())),
            var("NODE", host_ip),
        ];
        let values = pb::PodValues {
            env: vec![pb::ContainerEnv {
                container: "c".to_owned(),
                vars,
            }],
            ..Default::default()
        };
        let mut facts = Facts::default();
        "10.0.0.7".clone_into(&mut facts.fields.host_ip);
        let of = |name: &str, template: &str| {
            let mount = pb::Mount {
                sub_path_expr: template.to_owned(),
                ..Default::default()
            };
            let container = pb::Container {
                name: name.to_owned(),
                mounts: vec![mount],
                ..Default::default()
            };
            let mounts = mounts(&container, &values, &facts);
            mounts.map(|mut mounts| mounts.remove(0).sub_path)
        };
        assert_eq!(of("c", "$(NODE)/$(NAME)"), Ok("10.0.0.7/foo".to_owned()));
        assert_eq!(of("c", ""), Ok(String::new()));
        let missing = SubPathError::Missing("NAME".to_owned());
        assert_eq!(of("another", "$(NAME)"), Err(missing));
    }

    #[test]
    fn defaults_fill_what_nobody_set() {
        let image = pb::ImageConfig {
            env: strings(&["PATH=/i"]),
            ..Default::default()
        };
        let facts = Facts {
            hostname: hostname("pod"),
            ..Facts::default()
        };
        let container = pb::Container {
            tty: true,
            ..Default::default()
        };
        let spec = launch_spec(&container, &image, &PodValues::default(), &facts);
        assert_eq!(spec.env, [&b"PATH=/i"[..], b"HOSTNAME=pod", b"TERM=xterm"]);
        assert_eq!(spec.cwd, b"/");
        assert_eq!(spec.tty, Some(TERMINAL));
    }

    #[test]
    fn the_jobs_gpu_variables_override_the_images_and_the_pods_override_both() {
        let facts = Facts {
            devices: vec![("CUDA_VISIBLE_DEVICES".to_owned(), "1".to_owned())],
            binds_libraries: true,
            ..Facts::default()
        };
        let image = pb::ImageConfig {
            env: strings(&["PATH=/i", "HOSTNAME=", "CUDA_VISIBLE_DEVICES=all"]),
            ..Default::default()
        };
        let limits = pb::Resources {
            extended: [("nvidia.com/gpu".to_owned(), 1)].into(),
            ..Default::default()
        };
        let container = pb::Container {
            name: "c".to_owned(),
            limits: Some(limits),
            ..Default::default()
        };
        let shape = pb::PodSpec {
            containers: vec![container.clone()],
            ..Default::default()
        };
        let shape = PodSpec::accepted_before("u1".try_into().unwrap(), shape);
        let env = |vars: Vec<pb::EnvVar>| {
            let own = pb::ContainerEnv {
                container: "c".to_owned(),
                vars,
            };
            let values = pb::PodValues {
                env: vec![own],
                ..Default::default()
            };
            let values = PodValues::check(values, &shape).unwrap();
            launch_spec(&container, &image, &values, &facts).env[2..].to_vec()
        };
        let libraries = &b"LD_LIBRARY_PATH=/.singularity.d/libs"[..];
        assert_eq!(env(Vec::new()), [b"CUDA_VISIBLE_DEVICES=1", libraries]);
        let own = pb::EnvVar {
            name: "CUDA_VISIBLE_DEVICES".to_owned(),
            value: Some(pb::env_var::Value::Literal(b"0".to_vec().into())),
        };
        assert_eq!(env(vec![own]), [b"CUDA_VISIBLE_DEVICES=0", libraries]);
    }

    #[test]
    fn the_user_is_the_pods_then_the_images_then_root() {
        let container = |run_as_user| pb::Container {
            run_as_user,
            ..Default::default()
        };
        for (of_pod, of_image, wanted) in [
            (None, "", "0"),
            (None, "1000:100", "1000:100"),
            (None, "jovyan", "jovyan"),
            (Some(1001), "jovyan", "1001"),
            (Some(0), "1000", "0"),
        ] {
            let image = pb::ImageConfig {
                user: of_image.to_owned(),
                ..Default::default()
            };
            assert_eq!(user(&container(of_pod), &image), wanted.as_bytes());
        }
        let spec = |isolated| {
            let facts = Facts {
                isolated,
                ..Facts::default()
            };
            let image = pb::ImageConfig::default();
            launch_spec(&container(None), &image, &PodValues::default(), &facts)
        };
        assert_eq!(spec(true).user.as_deref(), Some(&b"0"[..]));
        // Without isolation the program has the node's accounts.
        assert_eq!(spec(false).user, None);
    }

    #[test]
    fn the_ids_are_the_pods_then_the_images_if_it_is_not_root() {
        let named = |of_image: &str| of_image.ends_with(":users").then_some(100);
        for (user, group, of_image, wanted) in [
            (None, None, "", [None, None]),
            (None, None, "0", [None, None]),
            (None, None, "jovyan", [Some(1000), None]),
            (None, None, "jovyan:5", [Some(1000), Some(5)]),
            (None, None, "jovyan:users", [Some(1000), Some(100)]),
            (None, None, "jovyan:staff", [Some(1000), None]),
            (None, None, "0:users", [None, None]),
            (None, None, "toor", [None, None]),
            (None, None, "nobody-knows", [None, None]),
            (None, None, "1234", [Some(1234), None]),
            (None, None, "1234:5", [Some(1234), Some(5)]),
            (None, None, "1234:users", [Some(1234), Some(100)]),
            (None, Some(7), "1234:users", [Some(1234), Some(7)]),
            (None, Some(7), "1234:5", [Some(1234), Some(7)]),
            (None, Some(7), "root", [None, Some(7)]),
            (Some(0), None, "1234:5", [Some(0), None]),
            (Some(1001), Some(2002), "", [Some(1001), Some(2002)]),
            (Some(i64::MAX), None, "1234", [None, None]),
        ] {
            let container = pb::Container {
                run_as_user: user,
                run_as_group: group,
                ..Default::default()
            };
            let image = pb::ImageConfig {
                user: of_image.to_owned(),
                ..Default::default()
            };
            let passwd = b"jovyan:x:1000:100::/:\ntoor:x:0:0::/:\n";
            assert_eq!(
                ids(&container, &image, (Some(passwd), named(of_image))),
                wanted,
                "{user:?} {group:?} {of_image}"
            );
        }
    }

    #[test]
    fn the_hosts_file_has_the_pods_names() {
        let mut facts = Facts {
            hostname: hostname("pod"),
            ..Facts::default()
        };
        facts.fields.pod_ip = "10.0.0.1".to_owned();
        let alias = pb::HostAlias {
            ip: "10.1.1.1".to_owned(),
            hostnames: strings(&["a", "b"]),
        };
        assert_eq!(
            hosts("127.0.0.1 localhost\n", &facts, &[alias]),
            "127.0.0.1 localhost\n\n# Entries added by KNoC.\n10.0.0.1\tpod\n10.1.1.1\ta\tb\n"
        );
    }

    #[test]
    fn the_termination_message_is_found() {
        let mounted = [
            (Path::new("/tmp"), false),
            (Path::new("/tmp/deep"), false),
            (Path::new("/fixed"), true),
        ];
        let at = |path: &str| {
            let container = pb::Container {
                termination_message_path: path.to_owned(),
                ..Default::default()
            };
            termination_log(&container, &mounted)
        };
        let inside = |path: &str, mount, rest: &str| TerminationLog::Mounted {
            path: path.into(),
            mount,
            rest: rest.into(),
        };
        assert_eq!(at("/tmp/deep/x"), inside("/tmp/deep/x", 1, "x"));
        assert_eq!(at("/tmp/deep"), inside("/tmp/deep", 1, ""));
        assert_eq!(at("/tmp/x"), inside("/tmp/x", 0, "x"));
        assert_eq!(at("/fixed/x"), TerminationLog::Bind("/fixed/x".into()));
        assert_eq!(at("/fixed"), inside("/fixed", 2, ""));
        assert_eq!(at("/other"), TerminationLog::Bind("/other".into()));
        assert_eq!(at("//srv/./x/"), TerminationLog::Bind("/srv/x".into()));
        let link = TerminationLog::Link {
            name: "/dev/termination-log".to_owned(),
            target: "/.knoc/termination-log".into(),
        };
        assert_eq!(at(""), link);
    }
}
