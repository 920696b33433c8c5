//! The shim and a node on which other containers of the account are being set up. It has a program of its own: while the test has
//! all turns, every other container of the account would wait.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod harness;

use std::{
    fs::File,
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    time::{Duration, Instant},
};

use harness::{DEADLINE, Job, sh};
use nix::{
    errno::Errno,
    fcntl::{FcntlArg, fcntl},
    libc,
};

/// Takes all turns of the account, once no other container has one. They are given back when the file is closed.
async fn all_turns() -> File {
    let path = format!("/dev/shm/knoc-shim-turns-{}", nix::unistd::getuid());
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(false);
    let file = options.mode(0o600).open(path).unwrap();
    let short = |number: i32| i16::try_from(number).unwrap();
    let all = libc::flock {
        l_type: short(libc::F_WRLCK),
        l_whence: short(libc::SEEK_SET),
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    let began = Instant::now();
    loop {
        match fcntl(&file, FcntlArg::F_OFD_SETLK(&all)) {
            Ok(_) => return file,
            Err(Errno::EAGAIN | Errno::EACCES) => {}
            Err(errno) => panic!("{errno}"),
        }
        assert!(began.elapsed() < DEADLINE, "other containers have turns");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Whether somebody waits for a lock on the file.
fn is_awaited(file: &File) -> bool {
    let inode = format!(":{} ", file.metadata().unwrap().ino());
    let locks = std::fs::read_to_string("/proc/locks").unwrap();
    let mut waiting = locks.lines().filter(|line| line.contains("->"));
    waiting.any(|line| line.contains(&inode))
}

#[tokio::test]
async fn a_container_begins_when_it_has_its_turn() {
    let turns = all_turns().await;
    let mut job = Job::new(vec![sh("a", "echo ran")]);
    job.start();
    let began = Instant::now();
    while !is_awaited(&turns) {
        let waits = began.elapsed() < DEADLINE;
        assert!(waits, "it waits for no turn: {}", job.state_words());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(!job.log_path("a", 0).exists(), "{}", job.state_words());
    drop(turns);
    assert_eq!(job.code().await, 0, "{}", job.state_words());
    assert_eq!(job.log("a", 0), "ran\n");
}
