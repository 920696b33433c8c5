//! The helper of one rank: `knoc-agent rank JOBDIR ATTEMPT ADDRESS…`, which srun starts on the node of the rank.
//!
//! It dials the shim, is told what to run, makes a container of it on its node, and exits as the program of the rank does.
//! It is the parent of the container, so that Slurm's binding, its accounting and its limits for the rank hold for the
//! program. [`super::ranks`] describes the protocol.
//!
//! Tasks, all owned by [`run`]: the reaper ([`super::children`]), one that reads the shim's messages, one for each
//! command beside the program ([`streams`]), and in one helper on each node one that removes what killed helpers have left
//! there. If the connection is lost, the program is killed: nobody would hear of its end, and the shim has counted the rank
//! as lost.

mod stoppable;
mod streams;

use std::{
    io,
    net::{IpAddr, SocketAddr},
    os::fd::{BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use knoc_contract::{
    host::node_name,
    jobdir::{self, JobDir, schema::Endpoint},
};
use knoc_link::{Connection, pinned::KeyPair};
use knoc_proto::{
    pb::{self, from_rank, to_rank},
    pod::PodValues,
    text::escape,
};
use rustix::process::Signal;
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt as _},
    signal::unix::{SignalKind, signal},
    sync::{mpsc, oneshot, watch},
    task::JoinSet,
    time::Instant,
};
use tokio_util::sync::CancellationToken;
use tracing::level_filters::LevelFilter;

use self::{
    stoppable::Stoppable,
    streams::{Streams, Way},
};
use super::{
    children::Children,
    container::{
        Attempt, Ended,
        rank::{self, Own},
    },
    link::dial,
    pod::Pod,
    ranks::{
        node::{NodeFolder, Shared},
        step, wire,
    },
    role::{ContainerSpec, RestartRule, Role, SlotId},
    scratch::{self, Cleaner, LAST_REMOVAL},
    signals,
};

/// Threads for file work that may take long or hang.
const BLOCKING_THREADS: usize = 4;

/// How long the helper tries to reach the shim. The shim waits longer.
const REACH: Duration = Duration::from_mins(2);
/// The pauses between two tries, which differ between ranks.
const AGAIN: Duration = Duration::from_millis(500);

/// How long the shim may take to say what to start.
const START: Duration = Duration::from_mins(1);

/// How long the last message may take.
const LAST_MESSAGE: Duration = Duration::from_secs(5);

/// How many orders of the shim may wait.
const ORDERS: usize = 16;

/// The exit code of a helper that could not do its work; the shim concludes from the connection, not from it.
const CANNOT_START: u8 = 128;

/// The longest termination message, in bytes, that a helper sends.
const MESSAGE: usize = 16 << 10;

/// Entry point of `knoc-agent rank`.
#[must_use]
pub fn main(jobdir: &Path, attempt: u32, addresses: &[String]) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(BLOCKING_THREADS)
        .build();
    let code = match runtime {
        Ok(runtime) => {
            let code = runtime.block_on(run(jobdir, attempt, addresses));
            // A file system that hangs must not keep the step running.
            runtime.shutdown_background();
            code
        }
        Err(error) => Err(error.into()),
    };
    match code {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            // srun carries it into the log of the container.
            eprintln!("knoc-agent rank: {}", escape(&format!("{error:#}")));
            ExitCode::from(CANNOT_START)
        }
    }
}

async fn run(path: &Path, attempt: u32, addresses: &[String]) -> anyhow::Result<u8> {
    // Slurm's signals to the step are answered by the shim, which tells each rank what it gets.
    let _ignored = ignore_signals()?;
    let rank = number("SLURM_PROCID")?;
    let jobdir = JobDir::open(path)?;
    let (cert, key) = jobdir.link_pair();
    let pair = KeyPair::from_files(&cert, &key)?;
    let launched_from = std::env::var("SLURM_LAUNCH_NODE_IPADDR").ok();
    let way = Way {
        addresses: in_order(addresses, launched_from.as_deref()),
        pair,
        attempt,
        rank,
    };
    let (mut reader, mut writer) = tokio::io::split(reach(&way).await?);
    let hello = pb::RankHello {
        attempt,
        rank,
        host: node_name(),
    };
    say(&mut writer, from_rank::Message::Hello(hello)).await?;
    let told = tokio::time::timeout(START, wire::read(&mut reader, wire::TO_RANK)).await;
    let told: Option<pb::ToRank> = told.context("the shim does not say what to start")??;
    let Some(to_rank::Message::Start(start)) = told.and_then(|told| told.message) else {
        anyhow::bail!("the shim has sent this rank away");
    };
    let mut tasks = JoinSet::new();
    let (sender, orders) = mpsc::channel(ORDERS);
    tasks.spawn(listen(reader, sender));
    let streams = Streams::new(way);
    let ran = Box::pin(run_program(
        (jobdir, start),
        orders,
        streams,
        (&mut writer, &mut tasks),
    ))
    .await;
    let code = match ran {
        Ok(code) => code,
        Err(error) => tell_end(&mut writer, not_run(&error)).await,
    };
    // Until now the shim knows by the connection that the helper still removes what the rank wrote.
    tokio::time::timeout(LAST_MESSAGE, writer.shutdown())
        .await
        .ok();
    Ok(code)
}

/// PURE: the end of a rank whose program could not be started.
fn not_run(error: &anyhow::Error) -> pb::RankEnded {
    pb::RankEnded {
        exit_code: CANNOT_START.into(),
        reason: "CreateContainerError".to_owned(),
        message: cut(&format!("{error:#}")),
        ..pb::RankEnded::default()
    }
}

/// Tells the shim how the rank ended. Returns the exit code of the helper.
async fn tell_end(writer: &mut (impl AsyncWrite + Unpin), end: pb::RankEnded) -> u8 {
    let code = u8::try_from(end.exit_code).unwrap_or(CANNOT_START);
    let saying = say(writer, from_rank::Message::Ended(end));
    // If the shim is gone, it has counted the rank as lost.
    tokio::time::timeout(LAST_MESSAGE, saying).await.ok();
    code
}

/// Runs the program to its end, in a container with the folder that the ranks on this node share. Returns the exit code of
/// the helper, once the shim was told how the program ended.
async fn run_program(
    (jobdir, start): (JobDir, pb::RankStart),
    orders: mpsc::Receiver<Order>,
    streams: Streams,
    (writer, tasks): (&mut (impl AsyncWrite + Unpin), &mut JoinSet<()>),
) -> anyhow::Result<u8> {
    let number = streams.way().attempt;
    let name = scratch::of_ranks(streams.way().pair.key_pem(), number, &node_name());
    let joining = move || NodeFolder::join(Path::new(scratch::MEMORY), &name);
    let folder = tokio::task::spawn_blocking(joining).await?;
    let folder = folder.context("create the /dev/shm that the ranks on this node share")?;
    let folder = Arc::new(folder);
    let ran = match prepare(jobdir, start, number, &folder) {
        Ok(prepared) => {
            if cleans(|name| std::env::var(name).ok()) {
                let cleaner = Cleaner::of(&prepared.pod.scratch);
                tasks.spawn(scratch::keep_clean(cleaner));
            }
            prepared.run(orders, streams, writer, tasks).await
        }
        Err(error) => Err(error),
    };
    if folder.holds() {
        // Their programs would end with this process. The shim ends them if they do not end by themselves.
        let folder = Arc::clone(&folder);
        let waiting = tokio::task::spawn_blocking(move || folder.wait_for_others());
        waiting.await.ok();
    }
    let until = std::time::Instant::now() + LAST_REMOVAL;
    let leaving = tokio::task::spawn_blocking(move || folder.leave(until));
    tokio::time::timeout(LAST_REMOVAL, leaving).await.ok();
    ran
}

/// PURE: whether this helper removes what killed helpers have left on its node: one on each node does. On the first node the
/// shim does. `variable` finds a variable of Slurm.
fn cleans(variable: impl Fn(&str) -> Option<String>) -> bool {
    let first_of_node = variable("SLURM_LOCALID").as_deref() == Some("0");
    first_of_node && variable("SLURM_NODEID").is_some_and(|node| node != "0")
}

/// PURE: whether there may be other ranks on this node; `ranks` are the numbers of those on it.
fn has_others(ranks: Option<&str>) -> bool {
    ranks.is_none_or(|ranks| ranks.contains([',', '-']))
}

/// Keeps Slurm's signals from ending the helper before its program, as long as what it returns exists.
fn ignore_signals() -> anyhow::Result<Vec<tokio::signal::unix::Signal>> {
    let kinds = [
        SignalKind::terminate(),
        SignalKind::interrupt(),
        SignalKind::hangup(),
        SignalKind::user_defined1(),
        SignalKind::user_defined2(),
    ];
    kinds.into_iter().map(|kind| Ok(signal(kind)?)).collect()
}

fn number(name: &str) -> anyhow::Result<u32> {
    let value = std::env::var(name).with_context(|| format!("{name} is not set: not in a step"))?;
    value.parse().with_context(|| format!("{name}={value:?}"))
}

/// Dials the shim until it answers or [`REACH`] is over: with many ranks its queue of connections may be full.
async fn reach(way: &Way) -> anyhow::Result<Connection> {
    let until = Instant::now() + REACH;
    loop {
        match dial::any(&way.addresses, &way.pair, way.pair.spki()).await {
            Ok((_, connection)) => return Ok(connection),
            Err(why) if Instant::now() >= until => {
                anyhow::bail!("connect to the shim on the first node of the job: {why}")
            }
            Err(_) => {
                tokio::time::sleep(AGAIN + AGAIN.mul_f64(rand::random::<f64>())).await;
            }
        }
    }
}

/// PURE: the addresses in the order in which they are tried: first the one from which srun was started, because Slurm's own
/// connections use it.
fn in_order(addresses: &[String], launched_from: Option<&str>) -> Vec<String> {
    let port = addresses
        .iter()
        .find_map(|address| address.rsplit_once(':')?.1.parse::<u16>().ok());
    let ip = launched_from.and_then(|ip| ip.parse::<IpAddr>().ok());
    let first = ip.zip(port);
    let mut all: Vec<String> = first
        .map(|(ip, port)| SocketAddr::new(ip, port).to_string())
        .into_iter()
        .collect();
    for address in addresses {
        if !all.contains(address) {
            all.push(address.clone());
        }
    }
    all
}

async fn say(
    writer: &mut (impl AsyncWrite + Unpin),
    message: from_rank::Message,
) -> io::Result<()> {
    let message = pb::FromRank {
        message: Some(message),
    };
    writer.write_all(&wire::frame(&message)?).await?;
    writer.flush().await
}

/// What the shim asks for after the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Order {
    Signal(Signal),
    OpenStream(u64),
    EndStream(u64),
}

/// Task: passes on what the shim asks for. When the connection ends, so does the channel.
async fn listen(mut reader: impl AsyncRead + Unpin, orders: mpsc::Sender<Order>) {
    while let Ok(Some(told)) = wire::read::<pb::ToRank>(&mut reader, wire::TO_RANK).await {
        let order = match told.message {
            Some(to_rank::Message::Signal(number)) => match signals::numbered(number) {
                Some(signal) => Order::Signal(signal),
                None => continue,
            },
            Some(to_rank::Message::OpenStream(stream)) => Order::OpenStream(stream),
            Some(to_rank::Message::EndStream(stream)) => Order::EndStream(stream),
            Some(to_rank::Message::Start(_)) | None => return,
        };
        if orders.send(order).await.is_err() {
            return;
        }
    }
}

/// A rank that is ready to run.
struct Prepared {
    pod: Pod,
    spec: ContainerSpec,
    values: PodValues,
    number: u32,
    own: Own,
}

/// Reads the pod from its job directory, as the shim does, and takes the rest from the shim. Blocks on file work, before
/// anything else runs.
fn prepare(
    jobdir: JobDir,
    start: pb::RankStart,
    number: u32,
    folder: &Arc<NodeFolder>,
) -> anyhow::Result<Prepared> {
    let claim = super::identity()?;
    let endpoint = endpoint(jobdir.path());
    let mut pod = Pod::open(jobdir, claim, endpoint.as_ref())?;
    // srun carries it into the log of the container.
    super::log(LevelFilter::WARN);
    // Programs conclude from the name which ranks are on one node.
    pod.facts.hostname.kernel = node_name();
    let memory = folder.memory();
    let pmix = std::env::var_os(step::PMIX_FOLDER).map(PathBuf::from);
    let on_node = std::env::var("SLURM_GTIDS").ok();
    pod.shared = Some(Shared {
        memory: memory.context("create the /dev/shm that the ranks on this node share")?,
        pmix: pmix.filter(|path| path.is_absolute() && path.is_dir()),
        processes: has_others(on_node.as_deref()).then(|| Arc::clone(folder)),
    });
    let values = start.values.unwrap_or_default();
    let values = PodValues::check(values, pod.spec())?;
    pod.volumes.write(&values)?;
    let spec = ContainerSpec {
        id: SlotId::after(0),
        role: Role::Main,
        restart: RestartRule::Never,
        container: start.container.unwrap_or_default(),
        image: start.image.unwrap_or_default(),
    };
    let pmi = std::env::var(step::PMI_FD).ok();
    let pmi = pmi.map(|number| inherited(&number)).transpose();
    let own = Own {
        variables: step::of_rank(std::env::vars_os()),
        stdio: stdio().context("standard output")?,
        pmi: pmi.context("the descriptor in PMI_FD")?,
    };
    Ok(Prepared {
        pod,
        spec,
        values,
        number,
        own,
    })
}

/// Where the agent listens, from which the shim and the helpers conclude the address of their node.
fn endpoint(jobdir: &Path) -> Option<Endpoint> {
    let state_dir = jobdir.parent().and_then(Path::parent)?;
    let path = jobdir::StateDir::new(state_dir).endpoint();
    jobdir::read_json(&path).ok().flatten()
}

fn stdio() -> io::Result<Vec<OwnedFd>> {
    let copy = |fd: BorrowedFd<'_>| Ok::<_, io::Error>(rustix::io::fcntl_dupfd_cloexec(fd, 3)?);
    Ok(vec![
        std::fs::File::open("/dev/null")?.into(),
        copy(rustix::stdio::stdout())?,
        copy(rustix::stdio::stderr())?,
    ])
}

/// A copy of a descriptor that the program which started this one has left open.
#[expect(
    unsafe_code,
    reason = "a descriptor that another program left open is known by its number only"
)]
fn inherited(number: &str) -> io::Result<OwnedFd> {
    let number: u16 = number.parse().map_err(io::Error::other)?;
    // SAFETY: the number is not negative, and is used within this call only; if nothing is open there, the kernel answers EBADF.
    let fd = unsafe { BorrowedFd::borrow_raw(i32::from(number)) };
    Ok(rustix::io::fcntl_dupfd_cloexec(fd, 3)?)
}

impl Prepared {
    /// Runs the program to its end, and tells the shim when it has started and how it has ended. Returns the exit code of the
    /// helper.
    async fn run(
        self,
        orders: mpsc::Receiver<Order>,
        mut streams: Streams,
        writer: &mut (impl AsyncWrite + Unpin),
        tasks: &mut JoinSet<()>,
    ) -> anyhow::Result<u8> {
        // Orphans of a program without a PID namespace become children of the helper.
        rustix::process::set_child_subreaper(Some(rustix::process::getpid())).ok();
        tasks.spawn(self.pod.children.clone().reap(Children::signal()?));
        let pod = Arc::new(self.pod);
        let abort = CancellationToken::new();
        // A rank has neither probes nor hooks, and the shim writes its log, so nobody reads the events.
        let (events, _events) = mpsc::channel(1);
        let attempt = Attempt {
            spec: Arc::new(self.spec),
            number: self.number,
            values: Arc::new(self.values),
            written: watch::Sender::new(0),
            abort: abort.clone(),
            events,
            target: None,
        };
        let (started, runs) = oneshot::channel();
        let running = rank::run(&pod, &attempt, self.own, started);
        let stoppable = Stoppable::new(abort);
        let around = (&pod, &mut streams, &mut *writer);
        let ended = stoppable.until_end(running, (runs, orders), around).await;
        // Of several ranks that fail, the first one counts, however long the removal of what it wrote takes.
        let code = tell_end(writer, end_of(&ended)).await;
        streams.finish().await;
        super::remove_folders(pod).await;
        Ok(code)
    }
}

fn end_of(ended: &Ended) -> pb::RankEnded {
    pb::RankEnded {
        exit_code: ended.exit.code,
        reason: ended.reason.to_owned(),
        message: cut(&ended.message),
        cpu_nanos: ended.used.cpu,
        page_faults: ended.used.faults,
        major_page_faults: ended.used.major,
    }
}

/// PURE: a text that fits into a message, cut between two characters.
fn cut(text: &str) -> String {
    let end = text.floor_char_boundary(MESSAGE);
    text.get(..end).unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_of_srun_comes_first_and_none_twice() {
        let given = ["10.0.0.1:4000", "c1:4000"].map(str::to_owned);
        assert_eq!(
            in_order(&given, Some("192.168.1.1")),
            ["192.168.1.1:4000", "10.0.0.1:4000", "c1:4000"]
        );
        assert_eq!(in_order(&given, Some("10.0.0.1")), given);
        assert_eq!(in_order(&given, Some("fe80::1"))[0], "[fe80::1]:4000");
        assert_eq!(in_order(&given, Some("c1; id")), given);
        assert_eq!(in_order(&given, None), given);
        assert!(in_order(&[], Some("10.0.0.1")).is_empty());
    }

    #[test]
    fn one_helper_on_each_node_without_the_shim_removes_leftovers() {
        let given = |node: Option<&str>, on_node: Option<&str>| {
            cleans(|name| match name {
                "SLURM_NODEID" => node.map(str::to_owned),
                "SLURM_LOCALID" => on_node.map(str::to_owned),
                other => panic!("{other}"),
            })
        };
        assert!(given(Some("1"), Some("0")) && given(Some("12"), Some("0")));
        assert!(!given(Some("0"), Some("0")), "the shim is there");
        assert!(!given(Some("1"), Some("1")), "another one does it");
        assert!(!given(None, Some("0")) && !given(Some("1"), None) && !given(None, None));
    }

    #[test]
    fn a_rank_has_others_on_its_node_unless_slurm_says_that_it_is_alone() {
        assert!(!has_others(Some("3")));
        assert!(has_others(Some("0,1")) && has_others(Some("0-3")) && has_others(None));
    }

    #[test]
    fn a_long_message_is_cut_between_characters() {
        let long = "ä".repeat(MESSAGE);
        let cut = cut(&long);
        assert!(cut.len() <= MESSAGE && long.starts_with(&cut));
        assert_eq!(super::cut("short"), "short");
    }

    #[test]
    fn a_descriptor_that_is_none_is_an_error() {
        for number in ["", "-1", "x", "65536", "60000"] {
            assert!(inherited(number).is_err(), "{number}");
        }
        assert!(inherited("1").is_ok());
    }

    #[tokio::test]
    async fn the_shim_is_told_how_the_rank_ended_and_the_connection_stays() {
        let (mut ours, mut theirs) = tokio::io::duplex(4096);
        for (given, expected) in [(0, 0), (137, 137), (-1, CANNOT_START), (256, CANNOT_START)] {
            let end = pb::RankEnded {
                exit_code: given,
                ..pb::RankEnded::default()
            };
            assert_eq!(tell_end(&mut ours, end.clone()).await, expected);
            let told = wire::read::<pb::FromRank>(&mut theirs, wire::FROM_RANK).await;
            let told = told.unwrap().and_then(|told| told.message);
            assert_eq!(told, Some(from_rank::Message::Ended(end)));
        }
        drop(theirs);
        let end = pb::RankEnded::default();
        assert_eq!(tell_end(&mut ours, end).await, 0, "the shim is gone");
    }

    #[tokio::test]
    async fn the_orders_of_the_shim_arrive_until_the_connection_ends() {
        let (ours, mut theirs) = tokio::io::duplex(4096);
        let (sender, mut orders) = mpsc::channel(ORDERS);
        let mut tasks = JoinSet::new();
        tasks.spawn(listen(ours, sender));
        for message in [
            to_rank::Message::Signal(15),
            to_rank::Message::Signal(999),
            to_rank::Message::Signal(32),
            to_rank::Message::Signal(37),
            to_rank::Message::OpenStream(1),
            to_rank::Message::EndStream(1),
            to_rank::Message::Signal(9),
        ] {
            let message = pb::ToRank {
                message: Some(message),
            };
            let frame = wire::frame(&message).unwrap();
            theirs.write_all(&frame).await.unwrap();
        }
        drop(theirs);
        for wanted in [
            Order::Signal(Signal::TERM),
            Order::Signal(signals::numbered(37).unwrap()),
            Order::OpenStream(1),
            Order::EndStream(1),
            Order::Signal(Signal::KILL),
        ] {
            assert_eq!(orders.recv().await, Some(wanted));
        }
        assert_eq!(orders.recv().await, None);
    }
}
