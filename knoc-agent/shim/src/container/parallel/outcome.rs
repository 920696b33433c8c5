//! How a container of several ranks has ended, from the ends of its ranks.

use std::path::PathBuf;

use knoc_contract::logs::{read::last_text, writer::Losses};

use super::{
    super::{
        super::{
            children::Exit,
            ranks::table::{End, Input, Loss, Table},
            usage::Counters,
        },
        Attempt, AttemptError, Done, FALLBACK_BYTES, FALLBACK_LINES, KILLED, MESSAGE_WAIT,
        with_signal,
    },
    cannot_run,
};

/// The reasons with which the attempt of a rank fails before its program runs.
const NOT_RUN: [&str; 3] = ["CreateContainerError", "ContainerCannotRun", "StartError"];

/// What is known once srun has ended.
#[derive(Debug)]
pub(super) struct Conducted {
    /// How srun ended.
    pub(super) srun: Exit,
    pub(super) table: Table,
    /// The ranks whose helpers are still connected.
    pub(super) connected: Vec<usize>,
    /// Whether the program of rank 0 has run.
    pub(super) ran: bool,
    /// What all ranks used.
    pub(super) used: Counters,
    /// Why the attempt fails whatever its ranks exit with.
    pub(super) failure: Option<String>,
}

/// How the container ended, and how the rank that decides was lost, if it was.
pub(super) async fn of(
    conducted: Conducted,
    attempt: &Attempt,
    losses: Losses,
    live: PathBuf,
) -> Result<(Done, Option<Loss>), AttemptError> {
    if let Some(message) = conducted.failure {
        return Err(cannot_run(message));
    }
    if !conducted.ran && attempt.abort.is_cancelled() {
        return Err(AttemptError::Aborted);
    }
    let mut table = conducted.table;
    for rank in conducted.connected {
        // Those that are not over although srun is were lost.
        table.step(rank, Input::Lost(Loss::Rank));
    }
    let Some(worst) = table.worst() else {
        let said = end_of_log(live).await;
        let code = conducted.srun.code;
        return Err(cannot_run(format!(
            "srun ended with code {code} before any rank was started: {said}"
        )));
    };
    let (rank, host, end) = (worst.rank, worst.host, worst.end);
    if let (0, Some(missing)) = (end.code, table.awaited().first()) {
        let said = end_of_log(live).await;
        let code = conducted.srun.code;
        return Err(cannot_run(format!(
            "rank {missing} was not started, and srun ended with code {code}: {said}"
        )));
    }
    if let Some(reason) = NOT_RUN.into_iter().find(|reason| *reason == end.reason) {
        return Err(AttemptError::Ranks {
            reason,
            message: format!("rank {rank} on {host}: {}", end.message),
        });
    }
    let exit = with_signal(Exit {
        code: end.code,
        signal: 0,
    });
    let killed = end.code == KILLED && end.reason == "OOMKilled";
    let container = &attempt.spec.container;
    let fallback = container.termination_message_fallback_to_logs && exit.code != 0;
    let mut message = message_of(rank, host, end, table.first());
    if fallback && end.message.is_empty() {
        message = end_of_log(live).await;
    }
    let lost = end.lost;
    Ok(((exit, message, losses, killed, conducted.used), lost))
}

/// PURE: the termination message of the container: that of rank 0 if all is well, else that of the worst rank, and if that
/// left none, which one it was.
fn message_of(rank: usize, host: &str, worst: &End, first: Option<&End>) -> String {
    let own = if worst.code == 0 { first } else { Some(worst) };
    let text = own.map_or("", |end| end.message.as_str());
    if text.is_empty() && worst.code != 0 {
        format!("rank {rank} on {host} ended with exit code {}", worst.code)
    } else {
        text.to_owned()
    }
}

/// The end of the container's log, which has srun's own messages.
async fn end_of_log(live: PathBuf) -> String {
    let reading =
        tokio::task::spawn_blocking(move || last_text(&live, FALLBACK_LINES, FALLBACK_BYTES));
    let text = tokio::time::timeout(MESSAGE_WAIT, reading).await;
    let text = text.ok().and_then(Result::ok).and_then(Result::ok);
    String::from_utf8_lossy(&text.unwrap_or_default())
        .trim()
        .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_message_is_that_of_the_rank_that_decides() {
        let end = |code, message: &str| End {
            code,
            message: message.to_owned(),
            ..End::default()
        };
        let (good, quiet) = (end(0, "all done"), end(7, ""));
        assert_eq!(message_of(2, "c2", &end(0, "x"), Some(&good)), "all done");
        assert_eq!(message_of(2, "c2", &end(0, ""), None), "");
        assert_eq!(message_of(2, "c2", &end(7, "why"), Some(&good)), "why");
        assert_eq!(
            message_of(2, "c2", &quiet, Some(&good)),
            "rank 2 on c2 ended with exit code 7"
        );
    }
}
