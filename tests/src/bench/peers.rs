//! The figures of other projects, from one run of them beside KNoC on the bed. `make bench` does not repeat that run: what it
//! printed is here.

use std::fmt::Write as _;

use super::Figures;

/// What was run, when, and on what.
const RUN: &str = "\
interLink 0.6.2 (commit 84a3810 of 2026-07-10) with its Slurm plugin (commit f8451d9 of 2026-07-14, after 0.6.2-pre5), Go KNoC (commit \
e1c17e3 of 2023-02-01, its last) and KNoC 0.1.0 (commit c963b0c3) were run alternately on 2026-11-30, on the machine and the test bed of the \
other sections. The others were built with Go 1.26.8. To run on the test bed, Go KNoC got another port, and a constant in place of the \
output of its script that makes a kubeconfig; a script told interLink the size of its node.\n\n\
20 pods ran one at a time, and then 50 at once, which were watched for 300 s. T1 of KNoC was not measured. The rows of the earlier run are \
from 2026-11-22 or before, and the version of interLink was not recorded then.";

/// The rows of the table: the figure, by hand, interLink, Go KNoC, and KNoC in the same run. Times are median / minimum / maximum in
/// milliseconds, or a median alone. A cell that begins with a number is also shown as a multiple of the row's figure by hand.
const ROWS: &[[&str; 5]] = &[
    [
        "1 pod: T1 created → job in the queue; by hand `sbatch`",
        "5 / 5 / 11",
        "23 / 17 / 29",
        "80 / 73 / 100",
        "–",
    ],
    [
        "1 pod: T2 created → first line; by hand with a writable root, as in KNoC's pods",
        "319 / 173 / 597",
        "364 / 186 / 551",
        "496 / 352 / 559",
        "482 / 419 / 612",
    ],
    [
        "the same; by hand with a read-only root, as in theirs",
        "505 / 371 / 558",
        "364 / 186 / 551",
        "496 / 352 / 559",
        "482 / 419 / 612",
    ],
    [
        "1 pod: T3 end of the program → final phase seen",
        "–",
        "3772 / 3559 / 3929",
        "1026 / 746 / 1291",
        "15 / 14 / 21",
    ],
    [
        "50 at once: T1 created → job in the queue; by hand `sbatch`",
        "5 / 4 / 19",
        "3240 / 260 / 8117",
        "1824 / 490 / 2493",
        "–",
    ],
    [
        "50 at once: T2 created → first line; by hand with a writable root, as in KNoC's pods",
        "3526 / 224 / 3969",
        "3623 / 1717 / 9149",
        "4344 / 876 / 5106",
        "3546 / 2160 / 5491",
    ],
    [
        "the same; by hand with a read-only root, as in theirs",
        "3121 / 1117 / 3717",
        "3623 / 1717 / 9149",
        "4344 / 876 / 5106",
        "3546 / 2160 / 5491",
    ],
    [
        "50 at once: T3 end of the program → final phase seen",
        "–",
        "246,581 / 7149 / > 300,000",
        "8291 / 3521 / 16,234",
        "24 / 12 / 131",
    ],
    [
        "of these 50 pods, Succeeded / without an end after 300 s",
        "–",
        "29 / 21",
        "50 / 0",
        "50 / 0",
    ],
    [
        "exec of `true` by a new kubectl each time; by hand `apptainer exec instance://`",
        "43 / 42 / 47",
        "not implemented (501)",
        "hangs",
        "88 / 80 / 115",
    ],
    [
        "earlier run: RPCs per minute to slurmctld at 50 running pods",
        "0",
        "36",
        "0 (never asks)",
        "–",
    ],
    [
        "earlier run: resident memory at 50 pods",
        "–",
        "65 + 39 + 34 MB",
        "43 MB",
        "–",
    ],
];

/// The section of the page.
pub(super) fn section(out: &mut String, figures: &Figures) -> anyhow::Result<()> {
    writeln!(
        out,
        "## Comparison with other projects\n\n\
         {RUN}\n\n\
         Neither run is that of the other sections, so compare milliseconds only with the floor of the same run: Slurm and Apptainer \
         by hand. Each figure that has a floor is also given as a multiple of it. The program sleeps 1 s, as above. Figures are median / \
         minimum / maximum in milliseconds unless the row says otherwise. Differences below 300 ms are not significant, because slurmctld \
         starts jobs once a second.\n\n\
         | | by hand | interLink | Go KNoC | KNoC, same run |\n|---|---|---|---|---|"
    )?;
    for [what, hand, others @ ..] in ROWS {
        write!(out, "| {what} | {hand} |")?;
        for figure in others {
            write!(out, " {} |", beside(hand, figure))?;
        }
        out.push('\n');
    }
    if let Some(one) = figures.batches.iter().find(|batch| batch.pods == 1) {
        writeln!(
            out,
            "\nKNoC in the run of the other sections, 1 pod: created → job in the queue {:.1} × `sbatch`, T2 {:.1} × by hand.",
            one.t2_before.median() / one.sbatch.median(),
            one.t2.median() / one.t2_hand.median(),
        )?;
    }
    writeln!(
        out,
        "\nTo repeat: `make bench` measures KNoC and its floors, but not the other projects (it starts the stack if it is not running)."
    )?;
    Ok(())
}

/// The figure, and how many times the figure by hand it is, if both are times.
fn beside(hand: &str, figure: &str) -> String {
    let ratio = median(figure).zip(median(hand));
    let ratio = ratio.map(|(figure, hand)| format!(" ({:.1} ×)", figure / hand));
    format!("{figure}{}", ratio.unwrap_or_default())
}

/// The number that the cell begins with; none if it is 0.
fn median(cell: &str) -> Option<f64> {
    let number = cell.split(' ').next()?.replace(',', "");
    number.parse().ok().filter(|number| *number > 0.0)
}

#[cfg(test)]
mod tests {
    use super::beside;

    #[test]
    fn times_are_shown_as_multiples_of_the_floor() {
        assert_eq!(
            beside("560", "1,400 / 415 / 1,407"),
            "1,400 / 415 / 1,407 (2.5 ×)"
        );
        for (hand, figure) in [
            ("–", "837 / 415 / 1407"),
            ("0", "36"),
            ("78", "hangs"),
            ("560", "> 300,000 / 17 / > 300,000"),
            ("≈ 1500", "3710 / 1591 / 8757"),
        ] {
            assert_eq!(beside(hand, figure), figure);
        }
    }
}
