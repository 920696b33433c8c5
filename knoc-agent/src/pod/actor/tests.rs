//! Actors over a real state directory and a scheduler of scripts.

use std::{os::unix::fs::PermissionsExt as _, time::Duration};

use jiff::Timestamp;
use knoc_proto::{ids::PodUid, pb::PodPhase};

use crate::{
    app::fake::Fake,
    jobdir::atomic,
    lease::{Holder, Process, STALE},
};

/// Slurm's commands as scripts, and so many submissions a second, one at a time.
async fn slurm(rate: f32) -> Fake {
    let fake = Fake::new(&format!(
        "[env]\nPATH = \"{{dir}}:/usr/bin:/bin\"\n\
         [limits]\nsbatch_burst = 1\nsbatch_rate = {rate:?}\n"
    ))
    .await;
    let counting = format!(
        "cat >/dev/null; echo x >>{}/jobs; echo 7",
        fake.path().display()
    );
    for (name, script) in [("sinfo", "true"), ("sbatch", &counting)] {
        let path = fake.path().join(name);
        atomic::write(&path, format!("#!/bin/sh\n{script}\n").as_bytes(), 0o755).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    fake
}

fn jobs(fake: &Fake) -> usize {
    let text = std::fs::read_to_string(fake.path().join("jobs")).unwrap_or_default();
    text.lines().count()
}

/// Another host's agent takes over, as if we had been silent for too long.
fn fence(fake: &Fake) {
    let other = Process {
        host: "elsewhere".to_owned(),
        ..Process::own()
    };
    let later = Timestamp::now() + 2 * STALE;
    Holder::take(&fake.site.state, other, later).unwrap();
}

#[tokio::test]
async fn an_agent_that_is_fenced_while_it_waits_for_its_rate_submits_nothing() {
    let fake = slurm(0.5).await;
    let [first, second] = ["a", "b"].map(|uid| PodUid::try_from(uid).unwrap());
    fake.ensure(&first).await;
    fake.seen(&first, |seen| seen.phase() == PodPhase::Queued)
        .await;
    fake.ensure(&second).await;
    // Into the wait of two seconds: only there a check that came too early shows.
    tokio::time::sleep(Duration::from_millis(300)).await;
    fence(&fake);
    fake.seen(&second, |seen| {
        matches!(seen.phase(), PodPhase::Throttled | PodPhase::Queued)
    })
    .await;
    let seen = fake.site.board.get("b").unwrap();
    assert!(seen.message.contains("was fenced"), "{}", seen.message);
    assert_eq!(jobs(&fake), 1);
}
